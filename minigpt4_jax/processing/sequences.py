"""Sequences of token ids: training rows, and prompts to be answered.

A prompt is text with `<ImageHere>` where an image goes. In a sequence each of these becomes P ids IMAGE
(config.visual_tokens), which the model replaces by projected visual tokens. Every text segment
between images is tokenized separately, as in the original's prompt_wrap and get_context_emb
(minigpt_base.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

from minigpt4_jax.config import IMAGE, ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import IMAGE_TAG, fill_template
from minigpt4_jax.processing.tokenizer import Tokenizer

CHAT_CONTEXT = 2000  # tokens the original's chat keeps of prompt and answer together


class TokenSequence(NamedTuple):
    """One training row, without padding."""

    tokens: list[int]  # BOS, prompt, answer; IMAGE in the image slots
    label_positions: list[int]  # positions in tokens of the labelled ones, ascending
    cut: bool  # whether the answer was longer than config.max_text_length


def build_row(
    tokenizer: Tokenizer, config: ModelConfig, prompt: str | None, answer: str, *, images: int
) -> TokenSequence:
    """BOS, prompt, answer + end symbol: the row of one question with one answer.

    prompt: the whole templated prompt; None stands for the bare visual tokens (stage 1).
    images: how many images the row has; the prompt must have as many `<ImageHere>`.
    The prompt is cut on the right to config.max_context, the answer to config.max_text_length (then
    without its end symbol). UserError: empty prompt, images and `<ImageHere>` do not agree.
    """
    answer_ids = tokenizer.encode(answer + config.end_symbol)
    labelled = [True] * len(answer_ids)
    return _join_row(
        tokenizer, config, _context(tokenizer, config, prompt, images), answer_ids, labelled
    )


def build_conversation_row(
    tokenizer: Tokenizer,
    config: ModelConfig,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    images: int,
) -> TokenSequence:
    """The row of a conversation: only answers are labelled (the original's tokenize_conversation).

    questions: plain, each gets config.prompt_template; the first holds every `<ImageHere>`.
    Everything after the first question is cut to config.max_text_length together.
    """
    if not questions or len(questions) != len(answers):
        raise UserError(
            f"conversation: {len(questions)} questions and {len(answers)} answers; expected as many"
        )
    if any(IMAGE_TAG in question for question in questions[1:]):
        raise UserError(f"conversation: {IMAGE_TAG} is allowed in the first question only")
    first, *later = (fill_template(config.prompt_template, question) for question in questions)
    ids: list[int] = []
    labelled: list[bool] = []
    for n, answer in enumerate(answers):
        if n:
            question = later[n - 1]
            has_bos = tokenizer.bos and question.startswith(tokenizer.bos)
            asked = tokenizer.encode(question if has_bos else tokenizer.bos + question)
            ids += asked
            labelled += [False] * len(asked)
        answered = tokenizer.encode(answer + config.end_symbol)
        ids += answered
        labelled += [True] * len(answered)
    return _join_row(tokenizer, config, _context(tokenizer, config, first, images), ids, labelled)


def _join_row(
    tokenizer: Tokenizer,
    config: ModelConfig,
    context: list[int],
    ids: list[int],
    labelled: list[bool],
) -> TokenSequence:
    tokens = context[: config.max_context]
    # families with a tokenizer.json spell BOS in their templates; the original always adds one
    spelled = tokenizer.kind == "hf" and tokens[:1] == [tokenizer.bos_id]
    if tokenizer.bos_id is not None and not spelled:
        tokens = [tokenizer.bos_id, *tokens]
    limit = config.max_text_length
    answers = [len(tokens) + n for n, label in enumerate(labelled[:limit]) if label]
    return TokenSequence(tokens + ids[:limit], answers, len(ids) > limit)


def _context(
    tokenizer: Tokenizer, config: ModelConfig, prompt: str | None, images: int, bos: bool = False
) -> list[int]:
    """Ids of a prompt, P times IMAGE for each of its images."""
    if prompt is None:
        if images == 0:
            raise UserError("a row without image needs a prompt")
        prompt = IMAGE_TAG * images
    if not prompt.strip():
        raise UserError(f"the prompt is empty; expected text, with {IMAGE_TAG} where an image goes")
    first, *rest = prompt.split(IMAGE_TAG)
    if len(rest) != images:
        raise UserError(
            f"the prompt has {len(rest)} {IMAGE_TAG} and {images} images were given; "
            f"write {IMAGE_TAG} once for each image: {_short(prompt)!r}"
        )
    ids = tokenizer.encode(first, bos=bos)
    for segment in rest:
        ids += [IMAGE] * config.visual_tokens
        ids += tokenizer.encode(segment)
    return ids


def prompt_tokens(
    tokenizer: Tokenizer, config: ModelConfig, prompt: str, *, images: int, extra_bos: bool = True
) -> list[int]:
    """Ids of a prompt to be answered: BOS is added to the first segment (get_context_emb).

    A prompt that spells `<s>` first gets a second BOS by that, and released weights were used so;
    extra_bos=False leaves one.
    """
    ids = _context(tokenizer, config, prompt, images, bos=True)
    if not extra_bos and ids[:2] == [tokenizer.bos_id] * 2:
        ids = ids[1:]
    return ids


def cut_left(
    tokens: Sequence[int], max_new_tokens: int, context: int = CHAT_CONTEXT
) -> tuple[list[int], int]:
    """Keep the end of a prompt so that it and its answer fit into `context` (Chat.answer_prepare).

    Returns the tokens and how many visual tokens were lost: the visual tokens to merge begin there.
    """
    begin = max(0, len(tokens) + max_new_tokens - context)
    if begin >= len(tokens):
        raise UserError(
            f"max_new_tokens {max_new_tokens} leaves no room for the prompt in {context} tokens; "
            "lower it"
        )
    return list(tokens[begin:]), sum(t == IMAGE for t in tokens[:begin])


def stop_sequences(tokenizer: Tokenizer, stop: str) -> list[list[int]]:
    """Id sequences that end an answer: the EOS token, and `stop` at the start of a text and inside
    it (LLaMA writes ### as 835 or as 2277, 29937)."""
    found = [[tokenizer.eos_id]]
    before = tokenizer.encode("a")
    inside = tokenizer.encode("a" + stop)
    candidates = [tokenizer.encode(stop)]
    if inside[: len(before)] == before:
        candidates.append(inside[len(before) :])
    for ids in candidates:
        if ids and ids not in found:
            found.append(ids)
    return found


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
