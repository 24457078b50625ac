"""The model of a run for inference, with the parameters of the moment."""

from typing import TYPE_CHECKING

from jax.sharding import Mesh

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.processing.tokenizer import Tokenizer
from minigpt4_jax.training.train_step import Split, Trainable

if TYPE_CHECKING:
    from minigpt4_jax.inference.model import Model


class CurrentModel:
    """Generates with a run's parameters; its programs are compiled once."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, mesh: Mesh, split: Split):
        self._config, self._tokenizer, self._mesh, self._split = config, tokenizer, mesh, split
        self._model: Model | None = None

    def with_parameters(self, trainable: Trainable) -> "Model":
        """The model with these parameters. It is the same object in every call."""
        module = self._split.join(trainable, self._split.frozen)
        if self._model is None:
            from minigpt4_jax.inference.model import Model

            self._model = Model(module, self._config, self._tokenizer, self._mesh)
        else:
            self._model.set_module(module)
        return self._model
