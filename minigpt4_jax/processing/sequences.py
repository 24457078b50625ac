"""Token sequences: training rows, and prompts for generation.

A prompt is text with `<ImageHere>` where an image goes. In a sequence each of these becomes P ids IMAGE
(config.visual_tokens), which the model replaces by projected visual tokens. Every text segment
between images is tokenized separately, as in the original's prompt_wrap and get_context_emb
(minigpt_base.py).

Models with one of the original's formats get their rows as the original builds them. Models that use their
tokenizer's chat template get exactly the rendered dialogue, tokenized as a whole.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from minigpt4_jax.config import IMAGE, ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.answer_spans import answer_spans
from minigpt4_jax.processing.chat_templates import (
    IMAGE_TAG,
    RenderedPrompt,
    TokenizerChatTemplate,
    chat_format,
    fill_template,
)
from minigpt4_jax.processing.image_first import image_first_prompt, image_first_row
from minigpt4_jax.processing.tokenizer import HfTokenizer, Tokenizer
from minigpt4_jax.utils.text import shorten

CHAT_CONTEXT = 2000  # tokens that the original's chat keeps of prompt and answer together


class TokenSequence(NamedTuple):
    """One training row, without padding."""

    tokens: list[int]  # BOS, prompt, answer; IMAGE in the image slots
    label_positions: list[int]  # positions of the labelled tokens, ascending
    cut: bool  # whether the answer was longer than config.max_text_length


# --- training rows ---------------------------------------------------------------------------------


def training_prompt(
    tokenizer: Tokenizer, config: ModelConfig, question: str, *, system: str = ""
) -> str:
    """The prompt of a single question, as the model is trained to answer it.

    question: with an `<ImageHere>` for each image. system: a system message. UserError: the tokenizer's
    template refuses them, or there is no place for a system message.
    """
    if system:
        check_takes_system(tokenizer, config)
    if config.tokenizer.chat_template:
        return chat_format(config, tokenizer).render([(question, None)], system=system or None)
    return fill_template(config.prompt_template, question)


def check_takes_system(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """UserError unless rows of this model have a place for a system message."""
    template = chat_format(config, tokenizer) if config.tokenizer.chat_template else None
    if not isinstance(template, TokenizerChatTemplate) or not template.takes_system:
        what = "chat template" if template else "prompt format"
        raise UserError(
            f"a row has a system message, for which the model's {what} has no place; remove it, or put its "
            "text into the first question"
        )


def build_row(
    tokenizer: Tokenizer, config: ModelConfig, prompt: str | None, answer: str, *, images: int
) -> TokenSequence:
    """The row of one prompt and its answer: BOS, prompt, answer, end symbol.

    prompt: the whole templated prompt; None is the visual tokens alone (stage 1).
    images: how many images the row has; the prompt must have as many `<ImageHere>`.
    The prompt is cut on the right to config.max_context, the answer to config.max_text_length (then
    without its end symbol). UserError: empty prompt, images and `<ImageHere>` do not agree.
    Rows of BLIP-2: see image_first.py.
    """
    if config.image_first:
        if prompt is not None and IMAGE_TAG in prompt:
            _check_image_count(prompt, images)
        return TokenSequence(*image_first_row(tokenizer, config, prompt, answer, images))
    context = _encode_prompt(tokenizer, config, prompt, images)
    bos = _adds_bos(tokenizer, config, rendered=isinstance(prompt, RenderedPrompt))
    answer_ids = tokenizer.encode(answer + config.end_symbol)
    return _join_row(tokenizer, config, context, answer_ids, [True] * len(answer_ids), bos)


def build_conversation_row(
    tokenizer: Tokenizer,
    config: ModelConfig,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    images: int,
    system: str = "",
) -> TokenSequence:
    """The row of a conversation; only answers are labelled (the original's tokenize_conversation).

    questions: without template, which is added here; they have an `<ImageHere>` for each image. system: a
    system message, for models that use their tokenizer's chat template.
    Everything after the first question is cut to config.max_text_length together.
    UserError: numbers of questions, answers, images and `<ImageHere>` that do not agree, or no place for
    the system message.
    """
    if not questions or len(questions) != len(answers):
        raise UserError(
            f"conversation: {len(questions)} questions and {len(answers)} answers; "
            "expected the same number of both, at least one"
        )
    if system:
        check_takes_system(tokenizer, config)
    if config.image_first:  # earlier turns are context, the last answer is labelled
        *earlier, last = answers
        dialogue = chat_format(config, tokenizer).render(
            list(zip(questions, [*earlier, None], strict=True))
        )
        return build_row(tokenizer, config, dialogue, last, images=images)
    if config.tokenizer.chat_template:
        turns = list(zip(questions, answers, strict=True))
        return _rendered_row(tokenizer, config, turns, images, system)
    prompts = [fill_template(config.prompt_template, question) for question in questions]
    in_first = prompts[0].count(IMAGE_TAG)
    context = _encode_prompt(
        tokenizer, config, prompts[0], in_first if len(prompts) > 1 else images
    )
    ids: list[int] = []
    labelled: list[bool] = []
    for n, answer in enumerate(answers):
        if n:
            prompt = prompts[n]
            if not (tokenizer.bos and prompt.startswith(tokenizer.bos)):
                prompt = tokenizer.bos + prompt
            prompt_ids = _encode_segments(tokenizer, config, prompt.split(IMAGE_TAG))
            ids += prompt_ids
            labelled += [False] * len(prompt_ids)
        answer_ids = tokenizer.encode(answer + config.end_symbol)
        ids += answer_ids
        labelled += [True] * len(answer_ids)
    _check_image_count(" ".join(prompts), images)
    bos = _adds_bos(tokenizer, config, rendered=True)
    return _join_row(tokenizer, config, context, ids, labelled, bos)


def _join_row(
    tokenizer: Tokenizer,
    config: ModelConfig,
    context: list[int],
    ids: list[int],
    labelled: list[bool],
    bos: bool,
) -> TokenSequence:
    tokens = context[: config.max_context]
    # Families with a tokenizer.json write BOS in their templates; the original always adds one.
    has_bos = tokenizer.kind == "hf" and tokens[:1] == [tokenizer.bos_id]
    if bos and tokenizer.bos_id is not None and not has_bos:
        tokens = [tokenizer.bos_id, *tokens]
    limit = config.max_text_length
    label_positions = [len(tokens) + n for n, label in enumerate(labelled[:limit]) if label]
    return TokenSequence(tokens + ids[:limit], label_positions, len(ids) > limit)


def _rendered_row(
    tokenizer: Tokenizer,
    config: ModelConfig,
    turns: Sequence[tuple[str, str]],
    images: int,
    system: str,
) -> TokenSequence:
    """The row of a conversation as the tokenizer's chat template renders it."""
    template = chat_format(config, tokenizer)
    assert isinstance(template, TokenizerChatTemplate) and isinstance(tokenizer, HfTokenizer)
    text, spans = answer_spans(template, turns, system or None)
    _check_image_count(text, images)
    tokens: list[int] = []
    labelled: list[bool] = []
    begin = 0  # of the segment in the text
    for n, segment in enumerate(text.split(IMAGE_TAG)):
        if n:
            tokens += [IMAGE] * config.visual_tokens
            labelled += [False] * config.visual_tokens
            begin += len(IMAGE_TAG)
        ids, starts = tokenizer.encode_with_offsets(segment)
        tokens += ids
        labelled += [any(a <= begin + start < b for a, b in spans) for start in starts]
        begin += len(segment)
    first = labelled.index(True) if True in labelled else len(tokens)
    return _join_row(tokenizer, config, tokens[:first], tokens[first:], labelled[first:], bos=False)


def _adds_bos(tokenizer: Tokenizer, config: ModelConfig, *, rendered: bool) -> bool:
    """Whether BOS goes before a text. rendered: the text comes from a chat template."""
    if config.tokenizer.chat_template and isinstance(tokenizer, HfTokenizer):
        return not rendered and tokenizer.adds_bos
    return True


def _encode_prompt(
    tokenizer: Tokenizer, config: ModelConfig, prompt: str | None, images: int, bos: bool = False
) -> list[int]:
    """Ids of a prompt, with P ids IMAGE for each of its images. None: the images alone."""
    if prompt is None:
        if images == 0:
            raise UserError("a row without images needs a prompt")
        prompt = IMAGE_TAG * images
    if not prompt.strip():
        raise UserError(f"the prompt is empty; expected text, with {IMAGE_TAG} where an image goes")
    _check_image_count(prompt, images)
    return _encode_segments(tokenizer, config, prompt.split(IMAGE_TAG), bos)


def _encode_segments(
    tokenizer: Tokenizer, config: ModelConfig, segments: Iterable[str], bos: bool = False
) -> list[int]:
    """Ids of the texts between images. bos: BOS before the first."""
    ids: list[int] = []
    for n, segment in enumerate(segments):
        if n:
            ids += [IMAGE] * config.visual_tokens
        ids += tokenizer.encode(segment, bos=bos and n == 0)
    return ids


def _check_image_count(prompt: str, images: int) -> None:
    if (marks := prompt.count(IMAGE_TAG)) != images:
        raise UserError(
            f"the prompt has {marks} {IMAGE_TAG} and {images} images were given; "
            f"write {IMAGE_TAG} once for each image: {shorten(prompt)!r}"
        )


# --- prompts for generation ------------------------------------------------------------------------


def prompt_tokens(
    tokenizer: Tokenizer,
    config: ModelConfig,
    prompt: str,
    *,
    images: int,
    extra_bos: bool = True,
) -> list[int]:
    """Ids of a prompt for generation.

    A RenderedPrompt is tokenized as it is; other prompts of a model that uses its tokenizer's chat template
    get BOS if the tokenizer adds it. Prompts of the original's formats always get BOS, before the first
    segment (get_context_emb). One that starts with `<s>` then has two, as released weights were used;
    extra_bos=False leaves one.
    UserError: as `build_row`.
    """
    if config.image_first:
        if IMAGE_TAG in prompt:
            _check_image_count(prompt, images)
        return image_first_prompt(tokenizer, config, prompt, images)
    bos = _adds_bos(tokenizer, config, rendered=isinstance(prompt, RenderedPrompt))
    ids = _encode_prompt(tokenizer, config, prompt, images, bos)
    if not extra_bos and ids[:2] == [tokenizer.bos_id] * 2:
        ids = ids[1:]
    return ids


def cut_left(
    tokens: Sequence[int], max_new_tokens: int, context: int = CHAT_CONTEXT
) -> tuple[list[int], int]:
    """Keep the end of a prompt so that it and its answer fit into `context` (Chat.answer_prepare).

    Returns the tokens, and how many visual tokens were dropped from the beginning.
    """
    begin = max(0, len(tokens) + max_new_tokens - context)
    if begin >= len(tokens):
        raise UserError(
            f"max_new_tokens {max_new_tokens} leaves no room for the prompt in {context} tokens; "
            "lower it"
        )
    return list(tokens[begin:]), sum(t == IMAGE for t in tokens[:begin])


def stop_sequences(tokenizer: Tokenizer, stop: str) -> list[list[int]]:
    """Id sequences that end an answer: EOS, and `stop` at the start of a text and within it (LLaMA
    tokenizes ### as 835 or as 2277, 29937)."""
    sequences = [[tokenizer.eos_id]]
    before = tokenizer.encode("a")
    within = tokenizer.encode("a" + stop)
    candidates = [tokenizer.encode(stop)]
    if within[: len(before)] == before:
        candidates.append(within[len(before) :])
    for ids in candidates:
        if ids and ids not in sequences:
            sequences.append(ids)
    return sequences
