"""From text to rows of token ids: training and inference rows, chat templates, clean answers.

A prompt is text with `<ImageHere>` where an image goes; in a row each of these becomes P ids IMAGE
(config.visual_tokens), which the model replaces by projected visual tokens. Every text segment
between images is tokenized on its own, as in the original's prompt_wrap and get_context_emb
(minigpt_base.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minigpt4_jax.config import IMAGE, ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.tasks import (  # of MiniGPT-v2: known by this module too
    caption,
    detection,
    grounding,
    identify,
    identify_mask,
    refer,
    vqa,
)
from minigpt4_jax.tokenizer import Tokenizer

__all__ = [
    "CHAT_CONTEXT", "CHAT_TEMPLATES", "IMAGE_SLOT", "IMAGE_TAG", "STAGE2_PROMPTS", "ChatTemplate",
    "Row", "answer_endings", "build_conversation_row", "build_row", "caption", "chat_template",
    "clean_answer", "cut_left", "detection", "fill_template", "find_template", "grounding",
    "identify", "identify_mask", "prompt_tokens", "refer", "render_chat", "stop_sequences", "vqa",
    "with_images",
]  # fmt: skip

IMAGE_TAG = "<ImageHere>"
IMAGE_SLOT = f"<Img>{IMAGE_TAG}</Img>"

# The original's prompts/alignment.txt: one of them is drawn for each stage-2 batch.
STAGE2_PROMPTS = (
    f"{IMAGE_SLOT} Describe this image in detail.",
    f"{IMAGE_SLOT} Take a look at this image and describe what you notice.",
    f"{IMAGE_SLOT} Please provide a detailed description of the picture.",
    f"{IMAGE_SLOT} Could you describe the contents of this image for me?",
)

CHAT_CONTEXT = 2000  # tokens the original's chat keeps of prompt and answer together


class Row(NamedTuple):
    """One training row, without padding."""

    tokens: list[int]  # BOS, prompt, answer; IMAGE in the image slots
    answers: list[int]  # positions in tokens of the labelled ones, ascending
    cut: bool  # whether the answer was longer than config.max_text_length


# --- training rows ---------------------------------------------------------------------------


def fill_template(template: str, instruction: str) -> str:
    """Put an instruction in the place of `{}`."""
    return template.replace("{}", instruction, 1)


def build_row(
    tokenizer: Tokenizer, config: ModelConfig, prompt: str | None, answer: str, *, images: int
) -> Row:
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
) -> Row:
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
) -> Row:
    tokens = context[: config.max_context]
    # families with a tokenizer.json spell BOS in their templates; the original always adds one
    spelled = tokenizer.kind == "hf" and tokens[:1] == [tokenizer.bos_id]
    if tokenizer.bos_id is not None and not spelled:
        tokens = [tokenizer.bos_id, *tokens]
    limit = config.max_text_length
    answers = [len(tokens) + n for n, label in enumerate(labelled[:limit]) if label]
    return Row(tokens + ids[:limit], answers, len(ids) > limit)


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


# --- inference rows --------------------------------------------------------------------------


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


# --- chat ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatTemplate:
    """How a dialogue is written for a language model; {} is where the message goes."""

    user: str
    assistant: str  # the prompt for the next answer ends at its {}
    system_format: str = "{}"
    system: str = ""  # the default message
    without_system: str = ""  # what stands in the place of an empty system message
    system_in_user: bool = False  # no system role: the message opens the first question


_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. "
    "You will be able to see the image once I provide it to you. Please answer my questions."
)

# The first three are the original's CONV_VISION templates, spacing and extra <s> as released
# weights know them; the others are how those model families were trained to chat.
CHAT_TEMPLATES = {
    "vicuna0": ChatTemplate(
        "Human: {}###", "Assistant: {}###", "{}###", system=_SYSTEM, without_system="###"
    ),
    "llama2": ChatTemplate("<s>[INST] {}", " [/INST] {}", system=_SYSTEM),
    "minigptv2": ChatTemplate("<s>[INST] {}", " [/INST]{}"),
    "chatml": ChatTemplate(
        "<|im_start|>user\n{}<|im_end|>\n",
        "<|im_start|>assistant\n{}<|im_end|>\n",
        "<|im_start|>system\n{}<|im_end|>\n",
    ),
    "llama3": ChatTemplate(
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    ),
    "mistral": ChatTemplate("[INST] {}", " [/INST] {}</s>", "{}\n\n", system_in_user=True),
}


def chat_template(config: ModelConfig) -> ChatTemplate:
    """The template named by config.chat_template; "training" is the one the model was trained with
    (config.prompt_template and the end symbol, no system message). UserError lists the known."""
    name = config.chat_template
    if name == "training":
        user, assistant = config.prompt_template.split("{}", 1)
        return ChatTemplate(user + "{}", assistant + "{}" + config.end_symbol)
    if name not in CHAT_TEMPLATES:
        known = ", ".join([*CHAT_TEMPLATES, "training"])
        raise UserError(f"chat_template {name!r} is not known; known are {known}")
    return CHAT_TEMPLATES[name]


def find_template(config: ModelConfig, template: str | ChatTemplate | None) -> ChatTemplate:
    """The template itself, the one of CHAT_TEMPLATES that is named, or, for None, the model's.
    UserError: an unknown name, or one without `{}`."""
    if template is None:
        return chat_template(config)
    if isinstance(template, str):
        if template not in CHAT_TEMPLATES:
            known = ", ".join(CHAT_TEMPLATES)
            raise UserError(f"template {template!r} is not known; known are {known}")
        return CHAT_TEMPLATES[template]
    for role in ("user", "assistant"):
        if "{}" not in getattr(template, role):
            raise UserError(
                f"template: {role} is {getattr(template, role)!r}; expected {{}} where the "
                "message goes"
            )
    return template


def answer_endings(template: ChatTemplate) -> tuple[str, ...]:
    """The stop texts of a template: what it writes after an answer, if anything."""
    ending = template.assistant.split("{}", 1)[1].strip()
    return (ending,) if ending else ()


def with_images(question: str, images: int) -> str:
    """Put `<Img><ImageHere></Img>` for each image before a question that does not place them."""
    if images == 0 or IMAGE_TAG in question:
        return question
    return " ".join(part for part in (IMAGE_SLOT * images, question) if part)


def render_chat(
    template: ChatTemplate,
    turns: Sequence[tuple[str, str | None]],
    *,
    system: str | None = None,
    extra_bos: bool = True,
) -> str:
    """The prompt of a dialogue (Conversation.get_prompt).

    turns: (question, answer) pairs, oldest first; an answer of None ends the prompt where it is to
    come. system: replaces the template's own message. extra_bos=False leaves out the `<s>` that the
    llama2 and minigptv2 templates put before the first question although a BOS is added in front.
    """
    if not turns:
        raise UserError("chat: there is no question to answer")
    system = template.system if system is None else system
    head = fill_template(template.system_format, system) if system else template.without_system
    text, opening = ("", head) if template.system_in_user else (head, "")
    for n, (question, answer) in enumerate(turns):
        user = template.user if n or extra_bos else template.user.removeprefix("<s>")
        text += fill_template(user, question if n else opening + question)
        if answer is None:
            return text + template.assistant.split("{}", 1)[0]
        text += fill_template(template.assistant, answer)
    return text


def clean_answer(text: str) -> str:
    """A decoded answer as shown: cut at ### and </s>, after the last role marker, stripped."""
    text = text.split("###")[0].split("</s>")[0].replace("<s>", "")
    for role in ("Assistant:", "[/INST]"):
        text = text.split(role)[-1]
    return text.strip()


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
