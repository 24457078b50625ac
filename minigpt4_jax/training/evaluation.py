"""Validation during training: the loss on held-out rows, and captions of a few held-out images."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from PIL import Image

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.dataset import ExampleList
from minigpt4_jax.data.json_records import Example, read_sources
from minigpt4_jax.data.loader import Loader, make_loader
from minigpt4_jax.data.mixture import MixtureComponent
from minigpt4_jax.parallel.multihost import is_multiprocess
from minigpt4_jax.parallel.sharding import shard_batch
from minigpt4_jax.processing.chat_templates import IMAGE_TAG, with_images
from minigpt4_jax.processing.images import ImageSource, name_of, open_image
from minigpt4_jax.processing.sequences import training_prompt
from minigpt4_jax.processing.tokenizer import Tokenizer
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.current_model import CurrentModel
from minigpt4_jax.training.row_assignment import process_shard
from minigpt4_jax.training.train_step import Split, Trainable, make_evaluation


def read_validation(c: TrainConfig) -> list[Example]:
    """The held-out rows of a run; none if its configuration names no validation data."""
    if not c.data.val_path:
        return []
    return read_sources(c.data.val_path, clean_captions=c.data.clean_captions)


def choose_examples(examples: Sequence[Example], count: int) -> list[Example]:
    """Up to `count` rows with images, all with different ones, spread evenly over the file."""
    by_images: dict[tuple[str, ...], Example] = {}
    for example in examples:
        if example.images:
            by_images.setdefault(tuple(map(_image_name, example.images)), example)
    distinct = list(by_images.values())
    count = min(count, len(distinct))
    return [distinct[i * len(distinct) // count] for i in range(count)]


def _image_name(source: ImageSource) -> str:
    """Equal for the same file, however its path is written."""
    name = name_of(source)
    return os.path.normpath(name) if isinstance(source, (str, os.PathLike)) else name


def sampled_turn(example: Example) -> tuple[tuple[ImageSource, ...], str]:
    """The first question with images and these; "" if the text is a caption of all of them."""
    if not example.questions:
        return example.images, ""
    question = next((q for q in example.questions if IMAGE_TAG in q), example.questions[0])
    images = example.images[: question.count(IMAGE_TAG) or None]
    return images, with_images(question, len(images))


class Sample(NamedTuple):
    """The images of a validation row with the model's text."""

    names: tuple[str, ...]
    images: tuple[Image.Image, ...]
    prompt: str
    text: str

    @property
    def record(self) -> dict[str, str | list[str]]:
        """As in samples.jsonl: the name of the image, or a list of names."""
        image = self.names[0] if len(self.names) == 1 else list(self.names)
        return {"image": image, "prompt": self.prompt, "text": self.text}


class Validation:
    """Evaluates the model on the held-out rows of a run."""

    def __init__(
        self,
        c: TrainConfig,
        config: ModelConfig,
        tokenizer: Tokenizer,
        mesh: Mesh,
        split: Split,
        examples: Sequence[Example],
        model: CurrentModel,
    ):
        """model: of the same run."""
        self._c, self._config, self._tokenizer = c, config, tokenizer
        self._mesh, self._split, self._examples = mesh, split, examples
        self._evaluate = make_evaluation(split, mesh)
        self._model = model

    def loss(self, trainable: Trainable, should_stop: Callable[[], bool]) -> float | None:
        """Mean negative log-likelihood per labelled token over the first `eval_examples` rows. None if
        `should_stop`, which is called after each batch, returns True."""
        loader = self._open_loader()
        sums: list[tuple[jax.Array, jax.Array]] = []
        for batch in loader:
            jax.block_until_ready(sums[-1:])  # otherwise a stop waits for all dispatched batches
            if should_stop():
                break
            rows = shard_batch(batch, self._mesh, (loader.num_rows, loader.num_local_rows))
            sums.append(self._evaluate(trainable, self._split.frozen, rows))
        loader.close()
        if should_stop():
            return None
        total, num_tokens = (sum(float(s[i]) for s in sums) for i in range(2))
        return total / max(num_tokens, 1)

    def _open_loader(self) -> Loader:
        c = self._c
        data = dataclasses.replace(
            c.data,
            mix={},
            mix_by="step",
            shuffle=False,
            crop=False,
            flip=False,
            workers=0,
            max_broken=0.0,
        )
        examples = ExampleList("", self._examples[: c.eval_examples])
        return make_loader(
            [MixtureComponent("", examples, prompts=data.prompts, exif=data.exif)], data, self._config,
            self._tokenizer, batch_size=c.micro_batch_size, seed=c.seed,
            epochs=1, keep_remainder=True,
            shard=partial(process_shard, self._mesh) if is_multiprocess() else None,
        )  # fmt: skip

    def captions(self, trainable: Trainable) -> list[Sample]:
        """Greedy texts for up to `sample_images` rows with different images; none if no row has an image."""
        c = self._c
        examples = choose_examples(self._examples, c.sample_images)
        if not examples:
            return []
        turns = [sampled_turn(e) for e in examples]
        names = [tuple(map(name_of, sources)) for sources, _ in turns]
        images = [
            tuple(open_image(source, exif=c.data.exif) for source in sources)
            for sources, _ in turns
        ]
        prompts = [
            self._prompt(question, len(sources), example.system)
            for example, (sources, question) in zip(examples, turns, strict=True)
        ]
        texts = self._model.with_parameters(trainable).generate(
            images, prompts, max_new_tokens=c.sample_tokens, temperature=0.0
        )
        return [Sample(*fields) for fields in zip(names, images, prompts, texts, strict=True)]

    def _prompt(self, question: str, num_images: int, system: str) -> str:
        if not question:
            if not self._c.data.prompts:
                return IMAGE_TAG * num_images  # stage 1: the caption follows the bare image
            question = with_images(self._c.data.prompts[0], num_images)
        return training_prompt(self._tokenizer, self._config, question, system=system)
