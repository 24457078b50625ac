"""Checks prompts and images and turns them into requests for the engine."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.detokenize import make_stop_check
from minigpt4_jax.inference.generation_config import GenerationConfig
from minigpt4_jax.inference.requests import Request
from minigpt4_jax.processing import chat_templates
from minigpt4_jax.processing.chat_templates import ChatTemplate
from minigpt4_jax.processing.images import ImageSource, is_image
from minigpt4_jax.processing.sequences import (
    cut_left,
    prompt_tokens,
    stop_sequences,
    training_prompt,
)
from minigpt4_jax.processing.tokenizer import Tokenizer

# An entry for each prompt: an image, a list of images, or None for text only.
Images: TypeAlias = Sequence[ImageSource | Sequence[ImageSource] | None] | np.ndarray
ImageGroups: TypeAlias = list[list[ImageSource]]  # the images of each prompt


def match_images(
    tokenizer: Tokenizer,
    config: ModelConfig,
    images: Images | None,
    prompts: Sequence[str | None],
    *,
    template: bool,
    extra_bos: bool = False,
    allow_none: bool = False,
) -> tuple[list[str | None], ImageGroups]:
    """Complete prompts, and the images of each as a list.

    template: put the prompts, plain questions, into the model's training template. allow_none: a
    prompt may be None, which stands for the image alone. UserError: not text, empty, or another
    number of images than of prompts.
    """
    complete: list[str | None] = [prompts] if isinstance(prompts, str) else list(prompts)
    groups = _image_groups(images, len(complete))
    for i, prompt in enumerate(complete):
        if not isinstance(prompt, str) and not (prompt is None and allow_none):
            raise UserError(f"prompt {i}: got {type(prompt).__name__}; expected text")
        if prompt is not None and not prompt.strip() and not config.image_first:
            raise UserError(f"prompt {i} is empty; expected text")
        if template and prompt is not None:
            complete[i] = _fill_training_template(
                tokenizer, config, prompt, len(groups[i]), extra_bos
            )
    return complete, groups


def _fill_training_template(
    tokenizer: Tokenizer, config: ModelConfig, question: str, num_images: int, extra_bos: bool
) -> str:
    question = chat_templates.with_images(question, num_images)
    prompt = training_prompt(tokenizer, config, question)
    template = chat_templates.chat_format(config, tokenizer)
    spells_bos = isinstance(template, ChatTemplate) and template.user.startswith("<s>")
    return "<s>" + prompt if spells_bos and extra_bos else prompt


def _image_groups(images: Images | None, num_prompts: int) -> ImageGroups:
    if images is None:
        return [[] for _ in range(num_prompts)]
    if is_image(images):
        images = [images]  # type: ignore[list-item]
    entries = list(images)
    if len(entries) != num_prompts:
        raise UserError(
            f"{len(entries)} images for {num_prompts} prompts; expected an entry for each prompt: "
            "an image, a list of images, or None for text only"
        )
    groups: ImageGroups = []
    for entry in entries:
        if entry is None:
            groups.append([])
        else:
            groups.append(list(entry) if isinstance(entry, (list, tuple)) else [entry])
    return groups


def make_requests(
    tokenizer: Tokenizer,
    model_config: ModelConfig,
    images: Images | None,
    prompts: Sequence[str],
    config: GenerationConfig,
    encode: Callable[[ImageGroups], list[np.ndarray | None]],
) -> list[Request]:
    """A request for each prompt. UserError as `Model.generate`.

    encode: image groups -> visual tokens [I * P, D] of each prompt; called once everything else is
    checked.
    """
    complete, groups = match_images(
        tokenizer,
        model_config,
        images,
        prompts,
        template=config.template,
        extra_bos=config.extra_bos,
    )
    seeds = config.seed_of_prompts(len(complete))
    tokenized = []
    for i, (prompt, group) in enumerate(zip(complete, groups, strict=True)):
        with error_context(f"prompt {i}"):
            tokens = _tokenize(tokenizer, model_config, prompt or "", len(group), config)
            tokenized.append(tokens)
    stop_texts = config.stop_of_prompts(len(complete))
    stop_ids = config.stop_ids_of_prompts(len(complete))
    # prompts usually share their stop texts
    sequences = {
        texts: _stop_sequences(tokenizer, (model_config.end_symbol, *texts))
        for texts in set(stop_texts)
    }
    # The end symbol needs a check of the text only if it is no single token.
    end = model_config.end_symbol
    always = (end,) if end.strip() and len(tokenizer.encode(end)) > 1 else ()
    checks = {
        texts: make_stop_check(tokenizer, (*always, *texts)) if always or texts else None
        for texts in set(stop_texts)
    }
    return [
        Request(
            tokens,
            None if visual is None else visual[num_cut:],
            config.max_new_tokens,
            config.sampling_params(tokenizer.bos_id),
            seeds[i],
            [*sequences[stop_texts[i]], *([token] for token in stop_ids[i])],
            config.beam_search(),
            stop_texts[i],
            checks[stop_texts[i]],
        )
        for i, ((tokens, num_cut), visual) in enumerate(zip(tokenized, encode(groups), strict=True))
    ]


def _stop_sequences(tokenizer: Tokenizer, stop_texts: Sequence[str]) -> list[list[int]]:
    """The token sequences that end an answer at any of these texts, without duplicates."""
    sequences = [ids for text in stop_texts for ids in stop_sequences(tokenizer, text)]
    return [ids for n, ids in enumerate(sequences) if ids not in sequences[:n]]


def _tokenize(
    tokenizer: Tokenizer,
    model_config: ModelConfig,
    prompt: str,
    num_images: int,
    config: GenerationConfig,
) -> tuple[list[int], int]:
    """Prompt ids that leave room for the answer, and how many visual tokens were cut off."""
    tokens = prompt_tokens(
        tokenizer, model_config, prompt, images=num_images, extra_bos=config.extra_bos
    )
    max_length = model_config.llm.max_length
    if config.context is not None:
        return cut_left(tokens, config.max_new_tokens, min(config.context, max_length))
    if len(tokens) + config.max_new_tokens > max_length:
        raise UserError(
            f"{len(tokens)} tokens and max_new_tokens {config.max_new_tokens} exceed the language "
            f"model's context of {max_length}; shorten the prompt or lower max_new_tokens"
        )
    return tokens, 0


def image_key(image: ImageSource) -> str | int:
    """Equal for images that need to be encoded only once: the same path, or the same object."""
    return str(image) if isinstance(image, (str, os.PathLike)) else id(image)


@contextlib.contextmanager
def error_context(name: str) -> Iterator[None]:
    """Prefix a UserError with the input it is about, such as "image 3"."""
    try:
        yield
    except UserError as e:
        kind = name.split()[0]
        raise UserError(f"{name}: {str(e).removeprefix(kind).lstrip(' :')}") from e
