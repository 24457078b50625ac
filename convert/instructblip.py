"""What InstructBLIP adds to the build of BLIP-2: the vocabulary of the Q-Former, which reads text."""

from pathlib import Path

from convert.build_plan import BuildRequest
from convert.formats.readers import read_json
from minigpt4_jax.config import QFormerConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.bert_tokenizer import QFORMER_VOCABULARY, VOCABULARY

MAX_TEXT_LENGTH = 128  # tokens that the Q-Former reads of an instruction
CAPTION_PROMPT = "A short image description."  # of captions in the paper
_FOLDER = "qformer_tokenizer"  # in Hugging Face directories
QFORMER_FILES = (f"{_FOLDER}/{VOCABULARY}", f"{_FOLDER}/tokenizer.json")


def is_instructblip(variant: str) -> bool:
    """Whether a variant's Q-Former reads the instruction."""
    return variant.startswith("instructblip")


def check_options(request: BuildRequest) -> None:
    """UserError: an option that InstructBLIP has no use for."""
    if request.qformer is not None:
        raise UserError(
            f"--qformer is given, but the Q-Former of {request.variant} is in --checkpoint"
        )
    if request.checkpoint is None:
        raise UserError(
            f"{request.variant} needs --checkpoint=PATH (for instance instruct_blip_vicuna7b_trimmed.pth, or "
            "a Hugging Face directory)"
        )


def qformer_vocabulary(
    request: BuildRequest, qformer: QFormerConfig | None
) -> dict[str, Path | bytes]:
    """BERT's vocabulary, from --tokenizer or the directory of --checkpoint. UserError: there is none, or
    it is another one than the Q-Former was trained with."""
    assert request.checkpoint is not None
    folder = request.tokenizer or request.checkpoint / _FOLDER
    content = _read_vocabulary(folder)
    if content is None:
        raise UserError(
            f"{request.variant} needs --tokenizer=DIR with BERT's {VOCABULARY}, which its Q-Former reads; "
            f"{folder} has none"
        )
    words = len(content.splitlines())
    rows = 0 if qformer is None else qformer.vocab
    if words not in (rows, rows - 1):  # [DEC] is not in all files
        raise UserError(
            f"{folder}: {words} tokens, but the Q-Former has {rows} with [DEC]; give the --tokenizer that it "
            "was trained with"
        )
    return {QFORMER_VOCABULARY: content}


def _read_vocabulary(folder: Path) -> bytes | None:
    """The lines of vocab.txt, or the same from tokenizer.json; None if there is neither."""
    if (folder / VOCABULARY).is_file():
        return (folder / VOCABULARY).read_bytes()
    if not (folder / "tokenizer.json").is_file():
        return None
    model = read_json(folder / "tokenizer.json").get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(words, dict):
        raise UserError(f"{folder / 'tokenizer.json'}: has no vocabulary; expected BERT's")
    return "\n".join(sorted(words, key=lambda word: int(words[word]))).encode() + b"\n"
