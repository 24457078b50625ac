"""Looking at a run from outside: the loss on held-out rows, captions of a few held-out images."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.dataset import ExampleList
from minigpt4_jax.data.json_records import Example, read_sources
from minigpt4_jax.data.loader import make_loader
from minigpt4_jax.data.mixture import MixtureComponent
from minigpt4_jax.parallel.multihost import is_multiprocess
from minigpt4_jax.parallel.sharding import mesh_of, shard_batch
from minigpt4_jax.processing.chat_templates import IMAGE_TAG, with_images
from minigpt4_jax.processing.images import name_of
from minigpt4_jax.processing.sequences import training_prompt
from minigpt4_jax.processing.tokenizer import Tokenizer
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.mesh_selection import share_of
from minigpt4_jax.training.train_step import Split, Trainable, make_evaluation

if TYPE_CHECKING:
    from minigpt4_jax.inference.model import Model


def read_validation(c: TrainConfig) -> list[Example]:
    """The held-out rows of a run's configuration; none where it names no data."""
    if not c.data.val_path:
        return []
    return read_sources(c.data.val_path, clean_captions=c.data.clean_captions)


class Validation:
    """The held-out rows of a run."""

    def __init__(
        self,
        c: TrainConfig,
        config: ModelConfig,
        tokenizer: Tokenizer,
        split: Split,
        examples: Sequence[Example],
    ):
        self._c, self._config, self._tokenizer, self._split = c, config, tokenizer, split
        self._examples = examples
        self._evaluate = make_evaluation(split)
        self._model: Model | None = None

    def loss(self, trainable: Trainable, stop: Callable[[], bool]) -> float | None:
        """Mean negative log-likelihood of a labelled token over the first `eval_examples` rows.
        None when `stop` becomes true meanwhile."""
        c, mesh = self._c, mesh_of(self._split.frozen)
        data = dataclasses.replace(
            c.data, mix={}, mix_by="step", shuffle=False, crop=False, workers=0, max_broken=0.0
        )
        examples = ExampleList("", self._examples[: c.eval_examples])
        loader = make_loader(
            [MixtureComponent("", examples, prompts=data.prompts)], data, self._config,
            self._tokenizer, batch_size=max(1, c.batch_size // c.accumulate), seed=c.seed,
            epochs=1, keep_remainder=True,
            shard=partial(share_of, mesh) if mesh is not None and is_multiprocess() else None,
        )  # fmt: skip
        sums: list[tuple[jax.Array, jax.Array]] = []
        for batch in loader:
            jax.block_until_ready(sums[-1:])  # else a stop would wait for all that is dispatched
            if stop():
                break
            rows = shard_batch(batch, mesh, (loader.num_rows, loader.num_local_rows))
            sums.append(self._evaluate(trainable, self._split.frozen, rows))
        loader.close()
        if stop():
            return None
        total, count = (sum(float(s[i]) for s in sums) for i in range(2))
        return total / max(count, 1)

    def captions(self, trainable: Trainable) -> list[dict[str, str]]:
        """What the model says now, greedily, to the first images: [{"image", "prompt", "text"}]."""
        c = self._c
        shown = [e for e in self._examples if len(e.images) == 1][: c.sample_images]
        if not shown:
            return []
        prompts = [self._prompt(e) for e in shown]
        texts = self._generator(trainable).generate(
            [e.images[0] for e in shown], prompts, max_new_tokens=c.sample_tokens, temperature=0.0
        )
        return [
            {"image": name_of(e.images[0]), "prompt": p, "text": t}
            for e, p, t in zip(shown, prompts, texts, strict=True)
        ]

    def _prompt(self, example: Example) -> str:
        drawn = self._c.data.prompts
        if not example.questions and not drawn:
            return IMAGE_TAG  # stage 1: the caption follows the bare image
        question = example.questions[0] if example.questions else drawn[0]
        return training_prompt(self._tokenizer, self._config, with_images(question, 1))

    def _generator(self, trainable: Trainable) -> "Model":
        module = self._split.join(trainable, self._split.frozen)
        if self._model is None:
            from minigpt4_jax.inference.model import Model

            mesh = mesh_of(self._split.frozen)
            self._model = Model(module, self._config, self._tokenizer, mesh)
        else:
            self._model.set_module(module)
        return self._model
