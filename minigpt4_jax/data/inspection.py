"""What a sample of the examples tells before training: batch sizes, cut answers, a fingerprint."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from minigpt4_jax.data.batching import BatchMaker
from minigpt4_jax.data.dataset import ExampleList
from minigpt4_jax.data.json_records import Example
from minigpt4_jax.data.mixture import MixtureComponent
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.images import name_of
from minigpt4_jax.processing.sequences import check_takes_system
from minigpt4_jax.utils.rounding import round_up

_MAX_IN_MEMORY = 10_000  # examples in memory that are checked for cut answers
_MAX_OPENED = 200  # examples of other sources, for all purposes

_log = logging.getLogger(__name__)


def sample_examples(
    component: MixtureComponent, seed: int, max_in_memory: int | None
) -> Iterator[Example]:
    """Evenly spaced examples, without those that cannot be read: of a source in memory at most
    max_in_memory (None: all), of others at most 200."""
    total = len(component.source)
    in_memory = isinstance(component.source, ExampleList)
    limit = (max_in_memory or total) if in_memory else _MAX_OPENED
    for i in range(0, total, -(-total // limit)):
        try:
            yield component.source.example(i, np.random.default_rng([seed, i]))
        except UserError:  # counted as skipped during training
            continue


def rows_for_tokens(component: MixtureComponent, maker: BatchMaker, multiple: int) -> int:
    """The batch size that fits into component.tokens if every row is as long as the longest of a
    sample, rounded down to a multiple. UserError: not even `multiple` rows fit."""
    prompt = maker.draw_prompt(0)
    sample = sample_examples(component, maker.seed, _MAX_OPENED)
    longest = max((len(maker.tokenize(example, prompt).tokens) for example in sample), default=1)
    width = round_up(longest, maker.padding.tokens)
    rows = component.tokens // width // multiple * multiple
    if rows == 0:
        raise UserError(
            f"data {component.name}: {multiple} rows of {width} tokens are more than its "
            f"{component.tokens} tokens a batch; raise tokens"
        )
    _log.info("data %s: batches of %d rows of up to %d tokens", component.name, rows, width)
    return rows


def warn_of_cut_answers(maker: BatchMaker) -> None:
    """Log one warning with a count for each dataset with answers longer than max_text_length."""
    for number, component in enumerate(maker.components):
        prompt, cut, total = maker.draw_prompt(0, number), 0, 0
        for example in sample_examples(component, maker.seed, _MAX_IN_MEMORY):
            total += 1
            cut += maker.tokenize(example, prompt).cut
        if cut:
            _log.warning(
                "data%s: %d of %d answers are longer than max_text_length %d tokens and are cut "
                "there, without their end symbol",
                f" {component.name}" if component.name else "", cut, total,
                maker.config.max_text_length,
            )  # fmt: skip


def check_system_messages(maker: BatchMaker) -> None:
    """UserError: rows in memory have system messages, for which the model's prompts have no place."""
    for component in maker.components:
        if not isinstance(component.source, ExampleList):
            continue
        examples = component.source.examples
        if count := sum(bool(example.system) for example in examples):
            try:
                check_takes_system(maker.tokenizer, maker.config)
            except UserError as e:
                name = f" {component.name}" if component.name else ""
                raise UserError(f"data{name}: {count} of {len(examples)} rows: {e}") from None


def fingerprint(maker: BatchMaker, shuffle: bool) -> dict[str, Any]:
    """Identifies the data and settings that a saved loader state belongs to: JSON values."""
    values: dict[str, Any] = {"seed": maker.seed, "shuffle": shuffle, "mix_by": maker.order.mix_by}
    for component in maker.components:
        own = {
            "batch_size": component.batch_size,
            "ratio": component.ratio,
            "examples": len(component.source),
            "contents": _content_hash(component, maker.seed),
        }
        values |= {f"{component.name} {key}".strip(): value for key, value in own.items()}
    return values


def _content_hash(component: MixtureComponent, seed: int) -> str:
    """Short hash of the prompts and of the texts and image names, in order; of a source that is not in
    memory, of a sample."""
    digest = hashlib.sha256(json.dumps(component.prompts).encode())
    for example in sample_examples(component, seed, None):
        names = [os.path.basename(name_of(image)) for image in example.images]
        texts = [names, example.questions, example.answers]
        if example.system:  # otherwise the hash is that of earlier versions
            texts.append(example.system)
        digest.update(json.dumps(texts).encode())
    return digest.hexdigest()[:16]
