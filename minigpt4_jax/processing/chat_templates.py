"""Chat templates: how a dialogue with images is written as the text of a prompt.

A model either has one of the original's formats, which its released weights were trained with, or the Jinja
template of its language model's own tokenizer, rendered by transformers (`TokenizerChatTemplate`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.tokenizer import HfTokenizer, Tokenizer

IMAGE_TAG = "<ImageHere>"
IMAGE_SLOT = f"<Img>{IMAGE_TAG}</Img>"

# The original's prompts/alignment.txt: one of them is drawn for each stage-2 batch.
STAGE2_PROMPTS = (
    f"{IMAGE_SLOT} Describe this image in detail.",
    f"{IMAGE_SLOT} Take a look at this image and describe what you notice.",
    f"{IMAGE_SLOT} Please provide a detailed description of the picture.",
    f"{IMAGE_SLOT} Could you describe the contents of this image for me?",
)

TOKENIZER_TEMPLATE = "tokenizer"  # the name of the tokenizer's own template

_MARK = re.compile("\ue000[0-9]+\ue001")

Turn = tuple[str, str | None]  # (question, answer); an answer of None is to be generated


class RenderedPrompt(str):
    """A prompt that a tokenizer's chat template has rendered: BOS is in it where it belongs."""


class ChatFormat(Protocol):
    """How dialogues are rendered as prompts."""

    @property
    def system(self) -> str:
        """The default system message that this project adds, "" for none."""
        ...

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer in a dialogue of this format."""
        ...

    def render(
        self, turns: Sequence[Turn], *, system: str | None = None, extra_bos: bool = True
    ) -> str:
        """The prompt of a dialogue.

        turns: oldest first; an answer of None ends the prompt where generation starts. system: replaces
        the default system message; "" is none. UserError: no turns, or a template that refuses them.
        """
        ...


def fill_template(template: str, instruction: str) -> str:
    """Replace the first `{}` of a template with an instruction."""
    return template.replace("{}", instruction, 1)


def with_images(question: str, images: int) -> str:
    """Put `<Img><ImageHere></Img>` for each image before a question that does not place them."""
    if images == 0 or IMAGE_TAG in question:
        return question
    return " ".join(part for part in (IMAGE_SLOT * images, question) if part)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat format written as strings; {} is where the message goes."""

    user: str
    assistant: str  # the prompt for the next answer ends at its {}
    system_format: str = "{}"
    system: str = ""  # the default message
    without_system: str = ""  # replaces an empty system message
    system_in_user: bool = False  # no system role: the message starts the first question

    @property
    def stop(self) -> tuple[str, ...]:
        """What the template writes after an answer, if anything."""
        ending = self.assistant.split("{}", 1)[1].strip()
        return (ending,) if ending else ()

    def render(
        self, turns: Sequence[Turn], *, system: str | None = None, extra_bos: bool = True
    ) -> str:
        """The prompt of a dialogue (the original's Conversation.get_prompt).

        extra_bos=False omits the `<s>` that the llama2 and minigptv2 templates put before the first
        question although a BOS is added in front. Otherwise as `ChatFormat.render`.
        """
        if not turns:
            raise UserError("chat: there is no question to answer")
        system = self.system if system is None else system
        head = fill_template(self.system_format, system) if system else self.without_system
        text, opening = ("", head) if self.system_in_user else (head, "")
        for n, (question, answer) in enumerate(turns):
            user = self.user if n or extra_bos else self.user.removeprefix("<s>")
            text += fill_template(user, question if n else opening + question)
            if answer is None:
                return text + self.assistant.split("{}", 1)[0]
            text += fill_template(self.assistant, answer)
        return text


class TokenizerChatTemplate:
    """The chat template of the language model's own tokenizer, rendered by transformers.

    What the template adds by itself, such as a default system message, is in the prompt.
    """

    system = ""

    def __init__(self, tokenizer: HfTokenizer):
        self._tokenizer = tokenizer
        self.bos = tokenizer.bos

    @cached_property
    def end_symbol(self) -> str:
        """What closes an answer: the template's text after it, up to its first special token.

        Where the template writes nothing, the special token that comes before the next question (GLM-4), or
        the tokenizer's EOS token. UserError: as `render`.
        """
        *_, rest = self.pieces([("?", "!")])
        special = [
            rest.find(token) + len(token)
            for token in self._tokenizer.special_tokens
            if token in rest
        ]
        end = rest[: min(special)] if special else rest
        return end.strip() or self._opening_token() or self._tokenizer.eos

    def _opening_token(self) -> str:
        """The special token that the template opens a later question with; "" if there is none, or BOS."""
        try:
            between = self.pieces([("?", "!"), ("?", None)])[2].lstrip()
        except UserError:  # for single questions only
            return ""
        tokens = [t for t in self._tokenizer.special_tokens if between.startswith(t)]
        longest = max(tokens, key=len, default="")
        return "" if longest == self._tokenizer.bos else longest

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template writes a system message; some refuse or drop it."""
        mark = "\ue000system\ue001"
        try:  # before an answer: some write it into the last question
            return mark in self._render([("?", None)], mark)
        except UserError:
            return False

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template reads the content of messages as lists of parts only."""
        mark = "\ue000"
        try:
            if mark in self._tokenizer.apply_chat_template(
                messages_of([(mark, None)]), add_generation_prompt=True
            ):
                return False
        except UserError:
            pass
        try:
            return mark in self._tokenizer.apply_chat_template(
                _in_parts(messages_of([(mark, None)])), add_generation_prompt=True
            )
        except UserError:
            return False

    @property
    def stop(self) -> tuple[str, ...]:
        """What closes an answer."""
        return (self.end_symbol,)

    def render(
        self, turns: Sequence[Turn], *, system: str | None = None, extra_bos: bool = True
    ) -> str:
        """As `ChatFormat.render`; the template writes BOS where it belongs, so extra_bos is not used.

        UserError also for a system message that the template drops.
        """
        if not turns:
            raise UserError("chat: there is no question to answer")
        text = self._render(turns, system)
        if system and system not in text and not self.takes_system:
            raise UserError(
                "the model's chat template has no place for a system message; leave it out, or put its "
                "text into the first question"
            )
        return RenderedPrompt(text)

    def _render(self, turns: Sequence[Turn], system: str | None) -> str:
        messages = messages_of(turns, system)
        return self._tokenizer.apply_chat_template(
            _in_parts(messages) if self._takes_parts else messages,
            add_generation_prompt=turns[-1][1] is None,
        )

    def pieces(self, turns: Sequence[Turn], system: str | None = None) -> list[str]:
        """The template's own texts around the messages of a dialogue: one more than there are messages.

        They have the system message, if there is one.

        UserError: the template drops, repeats or reorders messages.
        """
        # Messages are replaced by marks of private-use characters, at which the text is split.
        count = sum(1 + (answer is not None) for _, answer in turns)
        marks = [f"\ue000{n}\ue001" for n in range(count)]
        following = iter(marks)
        text = self.render(
            [(next(following), None if answer is None else next(following)) for _, answer in turns],
            system=system,
        )
        if _MARK.findall(text) != marks:
            raise UserError(
                "the tokenizer's chat template does not write every message once and in order; "
                "choose another --template"
            )
        return _MARK.split(text)


def known_format(template: TokenizerChatTemplate) -> str:
    """The name in CHAT_TEMPLATES of the format that a tokenizer's template renders, or "tokenizer"."""
    probes: tuple[tuple[str | None, list[Turn]], ...] = (
        (None, [("Q", None)]), (None, [("Q", "A"), ("R", None)]), ("S", [("Q", "A"), ("R", None)])
    )  # fmt: skip
    for name in ("chatml", "llama3", "mistral"):
        known = CHAT_TEMPLATES[name]
        try:
            if all(
                template.render(turns, system=system).removeprefix(template.bos)
                == known.render(turns, system=system)
                for system, turns in probes
            ):
                return name
        except UserError:
            continue
    return TOKENIZER_TEMPLATE


def messages_of(turns: Sequence[Turn], system: str | None = None) -> list[dict[str, Any]]:
    """A dialogue as messages with `role` and `content`, as chat templates take them."""
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


def _in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose content is a list with one part, as templates of multimodal models take them."""
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]


_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. "
    "You will be able to see the image once I provide it to you. Please answer my questions."
)
# The first three are the original's CONV_VISION templates, with the spacing and the extra <s> that released
# weights expect. The others are the formats of model directories written before a tokenizer's own template
# was used; they can be chosen by name.
CHAT_TEMPLATES = {
    "vicuna0": ChatTemplate(
        "Human: {}###", "Assistant: {}###", "{}###", system=_SYSTEM, without_system="###"
    ),
    "llama2": ChatTemplate(
        "<s>[INST] {}", " [/INST] {}", system=_SYSTEM
    ),
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
    "blip2": ChatTemplate("Question: {} ", "Answer:{}. "),  # as LAVIS joins earlier turns
    "mistral": ChatTemplate("[INST] {}", " [/INST] {}</s>", "{}\n\n", system_in_user=True),
}  # fmt: skip
_TRAINING = "training"


def chat_format(
    config: ModelConfig, tokenizer: Tokenizer, name: str | ChatTemplate | None = None
) -> ChatFormat:
    """The chat format that a name stands for, by default the model's own.

    name: one of CHAT_TEMPLATES; "tokenizer", the tokenizer's own Jinja template; "training", the format
    that the model was trained with (config.prompt_template and the end symbol, no system message); or a
    ChatTemplate of your own. UserError: an unknown name, a tokenizer without template, a template
    without `{}`.
    """
    if name is None:
        name = TOKENIZER_TEMPLATE if config.tokenizer.chat_template else config.chat_template
    if isinstance(name, ChatTemplate):
        for role in ("user", "assistant"):
            if "{}" not in getattr(name, role):
                raise UserError(
                    f"template: {role} is {getattr(name, role)!r}; expected {{}} where the message goes"
                )
        return name
    if name == _TRAINING:
        user, assistant = config.prompt_template.split("{}", 1)
        return ChatTemplate(user + "{}", assistant + "{}" + config.end_symbol)
    if name == TOKENIZER_TEMPLATE:
        if not isinstance(tokenizer, HfTokenizer) or not tokenizer.has_chat_template:
            raise UserError(
                f"template {name!r}: this model's tokenizer has no chat template; "
                f"choose one of {', '.join(CHAT_TEMPLATES)}"
            )
        return TokenizerChatTemplate(tokenizer)
    if name not in CHAT_TEMPLATES:
        known = ", ".join([*CHAT_TEMPLATES, _TRAINING, TOKENIZER_TEMPLATE])
        raise UserError(f"template {name!r} is not known; known are {known}")
    return CHAT_TEMPLATES[name]


# --- answers ---------------------------------------------------------------------------------------

_ORIGINAL_FORMATS = ("vicuna0", "llama2", "minigptv2")


def _has_original_format(config: ModelConfig) -> bool:
    if config.tokenizer.chat_template:
        return False
    trained = config.chat_template == _TRAINING and config.end_symbol in ("###", "</s>")
    return trained or config.chat_template in _ORIGINAL_FORMATS


def answer_ends(config: ModelConfig) -> tuple[str, ...]:
    """Texts that an answer is cut at besides its stop texts: those of the original's Chat.answer.

    Other formats close answers with special tokens, and their answers may have these texts.
    """
    return ("###", "</s>") if _has_original_format(config) else ()


def removed_text(config: ModelConfig) -> str:
    """The text that is removed from an answer wherever it stands, "" for none."""
    return "<s>" if _has_original_format(config) else ""


def role_names(config: ModelConfig) -> tuple[str, ...]:
    """What opens an answer in the original's formats: only the text behind it is the answer."""
    return ("Assistant:", "[/INST]") if _has_original_format(config) else ()


def clean_answer(config: ModelConfig, text: str) -> str:
    """A decoded answer as it is shown: stripped, and for the original's formats as its Chat.answer does:
    cut at ### and </s>, without <s>, and only what follows the last role name."""
    for end in answer_ends(config):
        text = text.split(end)[0]
    if removed := removed_text(config):
        text = text.replace(removed, "")
    for role in role_names(config):
        text = text.split(role)[-1]
    return text.strip()
