"""What a call of the Python interface is given: prompts and images, checked and made requests."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.detokenize import halting
from minigpt4_jax.inference.generation_config import GenerationConfig
from minigpt4_jax.inference.requests import Request
from minigpt4_jax.processing import chat_templates as texts
from minigpt4_jax.processing.images import ImageSource, is_image
from minigpt4_jax.processing.sequences import cut_left, prompt_tokens, stop_sequences
from minigpt4_jax.processing.tokenizer import Tokenizer

Images = Sequence[ImageSource | Sequence[ImageSource] | None] | np.ndarray


def paired(
    config: ModelConfig,
    images: Images | None,
    prompts: Sequence[str | None],
    *,
    template: bool,
    extra_bos: bool = False,
    none_allowed: bool = False,
) -> tuple[list[str | None], list[list[ImageSource]]]:
    """Prompts with the template filled in, and the images of each as a list.

    none_allowed: a prompt may be None, which is the image alone.
    """
    filled: list[str | None] = [prompts] if isinstance(prompts, str) else list(prompts)
    groups = _image_groups(images, len(filled))
    for i, prompt in enumerate(filled):
        if not isinstance(prompt, str) and not (prompt is None and none_allowed):
            raise UserError(f"prompt {i}: got {type(prompt).__name__}; expected text")
        if prompt is not None and not prompt.strip():
            raise UserError(f"prompt {i} is empty; expected text")
        if template and prompt is not None:
            filled[i] = _from_template(config, prompt, len(groups[i]), extra_bos)
    return filled, groups


def _from_template(config: ModelConfig, question: str, images: int, extra_bos: bool) -> str:
    question = texts.with_images(question, images)
    prompt = texts.fill_template(config.prompt_template, question)
    spelled = texts.chat_template(config).user.startswith("<s>")
    return "<s>" + prompt if spelled and extra_bos else prompt


def make_requests(
    tokenizer: Tokenizer,
    config: ModelConfig,
    images: Images | None,
    prompts: Sequence[str],
    generation_config: GenerationConfig,
    encode: Callable[[list[list[ImageSource]]], list[np.ndarray | None]],
) -> list[Request]:
    """encode: makes the visual tokens [I * P, D] of each group of images; called when all else is
    known to be right."""
    filled, groups = paired(
        config,
        images,
        prompts,
        template=generation_config.template,
        extra_bos=generation_config.extra_bos,
    )
    seeds = generation_config.seeds(len(filled))
    fitted = []
    for i, (prompt, group) in enumerate(zip(filled, groups, strict=True)):
        with naming(f"prompt {i}"):
            fitted.append(
                _fitting_prompt(tokenizer, config, prompt or "", len(group), generation_config)
            )
    stops, tokens_of = (
        generation_config.stop_texts(len(filled)),
        generation_config.stop_tokens(len(filled)),
    )
    sequences = {row: _sequences(tokenizer, (config.end_symbol, *row)) for row in set(stops)}
    halts = {row: halting(tokenizer, row) if row else None for row in set(stops)}
    options, beams = generation_config.sampling(tokenizer.bos_id), generation_config.beams()
    return [
        Request(
            tokens, v if v is None else v[lost:], generation_config.max_new_tokens, options, s,
            [*sequences[row], *([i] for i in ids)], beams, halts[row],
        )
        for (tokens, lost), v, s, row, ids in zip(
            fitted, encode(groups), seeds, stops, tokens_of, strict=True
        )
    ]  # fmt: skip


def _sequences(tokenizer: Tokenizer, stops: Sequence[str]) -> list[list[int]]:
    """The id sequences that end an answer at any of these texts."""
    found = [ids for text in stops for ids in stop_sequences(tokenizer, text)]
    return [ids for n, ids in enumerate(found) if ids not in found[:n]]


def _fitting_prompt(
    tokenizer: Tokenizer,
    config: ModelConfig,
    prompt: str,
    images: int,
    generation_config: GenerationConfig,
) -> tuple[list[int], int]:
    """Prompt ids that leave room for the answer, and how many visual tokens were cut off."""
    tokens = prompt_tokens(
        tokenizer, config, prompt, images=images, extra_bos=generation_config.extra_bos
    )
    new, longest = generation_config.max_new_tokens, config.llm.max_length
    if generation_config.context is not None:
        return cut_left(tokens, new, min(generation_config.context, longest))
    if len(tokens) + new > longest:
        raise UserError(
            f"{len(tokens)} tokens and max_new_tokens {new} exceed the language model's "
            f"context of {longest}; shorten the prompt or lower max_new_tokens"
        )
    return tokens, 0


def _image_groups(images: Images | None, count: int) -> list[list[ImageSource]]:
    """The images of each of `count` prompts."""
    if images is None:
        return [[] for _ in range(count)]
    if is_image(images):
        images = [images]  # type: ignore[list-item]
    entries = list(images)
    if len(entries) != count:
        raise UserError(
            f"{len(entries)} images for {count} prompts; expected an entry for each prompt: "
            "an image, a list of images, or None for text only"
        )
    groups: list[list[ImageSource]] = []
    for entry in entries:
        if entry is None:
            groups.append([])
        else:
            groups.append(list(entry) if isinstance(entry, (list, tuple)) else [entry])
    return groups


def identity(image: ImageSource) -> Any:
    """Equal for images that need to be encoded once."""
    return str(image) if isinstance(image, (str, os.PathLike)) else id(image)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Say in a UserError which of many inputs it is about."""
    try:
        yield
    except UserError as e:
        kind = name.split()[0]
        raise UserError(f"{name}: {str(e).removeprefix(kind).lstrip(' :')}") from e
