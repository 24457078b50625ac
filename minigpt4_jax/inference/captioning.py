"""Captions and answers of BLIP-2 with LAVIS' options, prompts and rules of length."""

from collections.abc import Sequence
from dataclasses import replace

from minigpt4_jax.config import IMAGE, ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.generation_config import GenerationConfig
from minigpt4_jax.inference.requests import Request

VQA_PROMPT = "Question: {} Short answer:"  # of LAVIS' evaluation
# max_length and repetition_penalty of LAVIS' `generate` of InstructBLIP
INSTRUCTED_LENGTH, INSTRUCTED_PENALTY = 256, 1.5


def caption_config(
    config: ModelConfig,
    *,
    num_beams: int = 5,
    max_length: int = 30,
    min_length: int = 1,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
    num_captions: int = 1,
    sample: bool = False,
    top_p: float = 0.9,
    temperature: float = 1.0,
    seed: int = 0,
) -> GenerationConfig:
    """The options of LAVIS' `generate` as those of `Model.generate`.

    Its answers begin with a token that is not shown: BOS, or an encoder's start token. The minimum counts
    it, and so do the length penalty and the repetition penalty; the maximum counts it without an encoder,
    so max_length=30 is 29 tokens of OPT and 30 of FlanT5.
    """
    first = 0 if config.llm.encoder_layers else 1
    if max_length <= first:
        raise UserError(f"max_length {max_length}: expected more than {first}")
    return GenerationConfig(
        max_new_tokens=max_length - first, min_new_tokens=min_length, compat=True,
        num_beams=1 if sample else num_beams, length_penalty=length_penalty,
        repetition_penalty=repetition_penalty, num_return_sequences=num_captions, seed=seed,
        temperature=temperature if sample else 0.0, top_p=top_p if sample else 1.0,
    )  # fmt: skip


def answer_config(
    config: ModelConfig,
    *,
    num_beams: int = 5,
    max_len: int = 10,
    min_len: int = 1,
    length_penalty: float | None = None,
) -> GenerationConfig:
    """The options of LAVIS' `predict_answers` as those of `Model.generate`. max_len counts new tokens only;
    length_penalty: by default 0 for OPT and Vicuna and -1 for FlanT5, which prefers short answers.

    InstructBLIP with Vicuna answers as by `caption_config`, with its repetition penalty and rule of length.
    """
    if length_penalty is None:
        length_penalty = -1.0 if config.llm.encoder_layers else 0.0
    if config.reads_instruction and not config.llm.encoder_layers:
        return caption_config(
            config, num_beams=num_beams, max_length=max_len, min_length=min_len,
            length_penalty=length_penalty, repetition_penalty=INSTRUCTED_PENALTY,
        )  # fmt: skip
    return GenerationConfig(
        max_new_tokens=max_len, min_new_tokens=min_len, compat=True, num_beams=num_beams,
        length_penalty=length_penalty,
    )  # fmt: skip


def question_prompts(
    questions: Sequence[str],
    prompt: str,
    history: Sequence[Sequence[tuple[str, str]]] | None = None,
) -> list[str]:
    """Questions in a prompt with `{}`, "" for none.

    history: earlier (question, answer) turns of each, which come before as `Question: q Answer: a.`.
    UserError: a prompt without `{}`, or another number of histories.
    """
    if prompt and "{}" not in prompt:
        raise UserError(
            f"prompt {prompt!r}: expected {{}} where the question goes, or an empty one"
        )
    earlier = [()] * len(questions) if history is None else list(history)
    if len(earlier) != len(questions):
        raise UserError(f"{len(earlier)} histories for {len(questions)} questions")
    prompts = []
    for question, turns in zip(questions, earlier, strict=True):
        before = "".join(f"Question: {q} Answer: {a}. " for q, a in turns)
        prompts.append(before + (prompt.replace("{}", question, 1) if prompt else question))
    return prompts


def cut_prompt(request: Request, config: ModelConfig) -> Request:
    """A request whose prompt is cut as LAVIS cuts it: text with BOS to config.max_text_length tokens for
    OPT; not at all for an encoder or InstructBLIP."""
    if config.llm.encoder_layers or config.reads_instruction:
        return request
    visual = sum(token == IMAGE for token in request.tokens)
    return replace(request, tokens=request.tokens[: visual + config.max_text_length])
