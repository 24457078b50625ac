"""Checks prompts and images and turns them into requests for the engine."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.detokenize import make_stop_check
from minigpt4_jax.inference.generation_config import GenerationConfig
from minigpt4_jax.inference.requests import Request
from minigpt4_jax.inference.visual_tokens import VisualTokens
from minigpt4_jax.processing import chat_templates
from minigpt4_jax.processing.chat_templates import ChatTemplate, answer_ends
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
) -> tuple[list[str | None], ImageGroups]:
    """Complete prompts, and the images of each as a list; a prompt may be None: the image alone.

    template: put the prompts, plain questions, into the model's training template. UserError: not
    text, empty, or another number of images than of prompts.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    groups = _image_groups(images, len(prompts))
    complete: list[str | None] = []
    for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        with error_context(f"prompt {i}"):
            text = None if prompt is None else _checked(prompt, config)
            if template and text is not None:
                text = _fill_training_template(tokenizer, config, text, len(group))
        complete.append(text)
    return complete, groups


def _checked(prompt: Any, config: ModelConfig) -> str:
    """The prompt. UserError: not text, or empty, which is a prompt only after an image without tags."""
    if not isinstance(prompt, str):
        raise UserError(f"got {type(prompt).__name__}; expected text")
    if not prompt.strip() and not config.image_first:
        raise UserError("prompt: empty; expected text")
    return prompt


def _fill_training_template(
    tokenizer: Tokenizer,
    config: ModelConfig,
    question: str,
    num_images: int,
    extra_bos: bool = False,
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
    if isinstance(images, Mapping):
        raise UserError("images: got a dictionary; expected a list with an entry for each prompt")
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
            several = isinstance(entry, (list, tuple)) or getattr(entry, "ndim", 0) == 4
            groups.append(list(entry) if several else [entry])
    return groups


@dataclass(frozen=True)
class PreparedPrompt:
    """A checked prompt, whose images are not encoded yet."""

    request: Request  # still without visual tokens
    images: tuple[ImageSource, ...]
    num_cut: int  # visual tokens that were cut off on the left

    def with_visual(self, visual: VisualTokens | None) -> Request:
        """The request with visual tokens [I * P, D] of all the images."""
        if visual is not None and self.num_cut:
            visual = visual[self.num_cut :]
        return replace(self.request, visual=visual)


def prepare_prompts(
    tokenizer: Tokenizer,
    model_config: ModelConfig,
    images: Images | None,
    prompts: Sequence[str],
    config: GenerationConfig,
) -> Iterator[PreparedPrompt | UserError]:
    """Each prompt, checked and tokenized, or what is wrong with it.

    UserError: another number of images, seeds or stops than of prompts.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    groups = _image_groups(images, len(prompts))
    seeds = config.seed_of_prompts(len(prompts))
    stop_texts = config.stop_of_prompts(len(prompts))
    stop_ids = config.stop_ids_of_prompts(len(prompts))
    vocab = model_config.llm.vocab
    for token in {token for ids in stop_ids for token in ids if token >= vocab}:
        raise UserError(
            f"stop_ids {token}: the model has {vocab} tokens; expected 0 to {vocab - 1}"
        )
    rules = {texts: _StopRules.make(tokenizer, model_config, texts) for texts in set(stop_texts)}
    # the token that the original's answers begin with
    first = model_config.llm.start_id if model_config.llm.encoder_layers else tokenizer.bos_id
    if model_config.reads_instruction and not model_config.llm.encoder_layers:
        first = model_config.tokenizer.bos_id
    sampling, beam_search = config.sampling_params(first), config.beam_search()
    for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        try:
            text = _checked(prompt, model_config)
            if config.template:
                text = _fill_training_template(
                    tokenizer, model_config, text, len(group), config.extra_bos
                )
            tokens, num_cut = _tokenize(tokenizer, model_config, text, len(group), config)
        except UserError as e:
            yield e
            continue
        sequences, stop_check = rules[stop_texts[i]]
        request = Request(
            tokens, None, config.max_new_tokens, sampling, seeds[i],
            [*sequences, *([token] for token in stop_ids[i])],
            beam_search, stop_texts[i], stop_check,
        )  # fmt: skip
        yield PreparedPrompt(request, tuple(group), num_cut)


class _StopRules(NamedTuple):
    """How an answer ends at stop texts; prompts usually share them."""

    sequences: list[list[int]]  # token sequences, without duplicates
    check: Callable[[list[int]], int | None] | None

    @classmethod
    def make(
        cls, tokenizer: Tokenizer, config: ModelConfig, texts: tuple[str, ...]
    ) -> "_StopRules":
        end = config.end_symbol
        sequences = [ids for text in (end, *texts) for ids in stop_sequences(tokenizer, text)]
        if not config.ends_at_eos:
            sequences = [ids for ids in sequences if ids != [tokenizer.eos_id]]
        sequences += [[token] for token in config.tokenizer.end_ids]
        unique = [ids for n, ids in enumerate(sequences) if ids not in sequences[:n]]
        # Special tokens are recognized as tokens; the text of others may be spelled in several ways.
        always = [e for e in (end, *answer_ends(config)) if _is_spelled(tokenizer, e)]
        checked = (*always, *texts)
        return cls(unique, make_stop_check(tokenizer, checked) if checked else None)


def _is_spelled(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a text appears in what is decoded, as special tokens and white space do not."""
    return bool(tokenizer.decode(tokenizer.encode(text)).strip())


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
