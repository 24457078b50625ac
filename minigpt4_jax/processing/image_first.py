"""Token sequences of BLIP-2, whose images come before the text and without tags.

OPT reads visual tokens, BOS, text. FlanT5's encoder reads visual tokens, text, EOS; its answer is a
sequence of its own. A training row holds that answer behind the encoder's tokens, as its labelled tokens.
"""

from typing import NamedTuple

from minigpt4_jax.config import IMAGE, ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.bert_tokenizer import BertTokenizer
from minigpt4_jax.processing.chat_templates import IMAGE_SLOT, IMAGE_TAG
from minigpt4_jax.processing.tokenizer import Tokenizer


class ImageFirstRow(NamedTuple):
    """The fields of a TokenSequence."""

    tokens: list[int]
    label_positions: list[int]
    cut: bool


def image_first_prompt(
    tokenizer: Tokenizer, config: ModelConfig, prompt: str, images: int
) -> list[int]:
    """Ids of a prompt for generation; its text may be empty."""
    text = without_tags(prompt)
    visual = [IMAGE] * (images * config.visual_tokens)
    if config.llm.encoder_layers:
        return [*visual, *tokenizer.encode(text), tokenizer.eos_id]
    return visual + _encode_with_bos(tokenizer, config, text)


def _encode_with_bos(tokenizer: Tokenizer, config: ModelConfig, text: str) -> list[int]:
    """BOS and the text. InstructBLIP's Vicuna begins with another token than its tokenizer's BOS."""
    bos = config.tokenizer.bos_id
    if bos in (None, tokenizer.bos_id):
        return tokenizer.encode(text, bos=True)
    return [bos, *tokenizer.encode(text)]


def without_tags(prompt: str) -> str:
    """A prompt without the marks of its images: wherever they stand, images come first."""
    for mark in (IMAGE_SLOT, IMAGE_TAG):
        prompt = prompt.replace(f"{mark} ", "").replace(mark, "")
    return prompt


def image_first_row(
    tokenizer: Tokenizer, config: ModelConfig, prompt: str | None, answer: str, images: int
) -> ImageFirstRow:
    """The training row of a caption (prompt None) or of a question and its answer.

    Captions begin with config.caption_prompt, which is not labelled; for FlanT5 it is what the encoder
    reads. Prompt and answer are cut to config.max_text_length tokens each, a caption with its prompt.
    """
    if config.is_stage1:
        return _stage1_row(tokenizer, config, answer, images)
    if config.llm.encoder_layers:
        return _encoder_row(tokenizer, config, prompt, answer, images)
    if prompt is None:
        return _caption_row(tokenizer, config, answer, images)
    tokens = image_first_prompt(tokenizer, config, prompt, images)[: config.max_context]
    space = "" if config.reads_instruction else " "  # Vicuna's tokenizer adds its own
    ids = tokenizer.encode(f"{space}{answer.strip()}{config.end_symbol}")
    return _labelled(tokens, ids, config.max_text_length)


def _labelled(tokens: list[int], ids: list[int], limit: int, skip: int = 0) -> ImageFirstRow:
    """tokens followed by ids, of which all but the first `skip` are labelled."""
    kept = ids[:limit]
    labels = range(len(tokens) + min(skip, len(kept)), len(tokens) + len(kept))
    return ImageFirstRow(tokens + kept, list(labels), len(ids) > limit)


def _caption_row(
    tokenizer: Tokenizer, config: ModelConfig, caption: str, images: int
) -> ImageFirstRow:
    begin = config.caption_prompt
    if begin and not caption.startswith(begin):
        caption = f"{begin} {caption}"
    ids = tokenizer.encode(caption + config.end_symbol, bos=True)
    skip = len(tokenizer.encode(begin, bos=True)) if begin else 0  # BOS is labelled otherwise
    visual = [IMAGE] * (images * config.visual_tokens)
    return _labelled(visual, ids, config.max_text_length, skip)


def _encoder_row(
    tokenizer: Tokenizer, config: ModelConfig, prompt: str | None, answer: str, images: int
) -> ImageFirstRow:
    limit = config.max_text_length - 1  # with EOS, which a cut keeps
    text = tokenizer.encode(without_tags(config.caption_prompt if prompt is None else prompt))
    visual = [IMAGE] * (images * config.visual_tokens)
    tokens = [*visual, *text[:limit], tokenizer.eos_id]
    ids = tokenizer.encode(answer)
    row = _labelled(tokens, [*ids[:limit], tokenizer.eos_id], limit + 1)
    return row._replace(cut=len(ids) > limit)


def _stage1_row(
    tokenizer: Tokenizer, config: ModelConfig, caption: str, images: int
) -> ImageFirstRow:
    if not isinstance(tokenizer, BertTokenizer) or images != 1:
        raise UserError(f"a row of {config.variant} needs one image; this one has {images}")
    ids = tokenizer.encode_text(caption)
    tokens = tokenizer.encode_text(caption, config.max_text_length)
    return ImageFirstRow(tokens, list(range(1, len(tokens))), len(tokens) < len(ids))
