"""Chat templates: how a dialogue with images is written as the text of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError

IMAGE_TAG = "<ImageHere>"
IMAGE_SLOT = f"<Img>{IMAGE_TAG}</Img>"

# The original's prompts/alignment.txt: one of them is drawn for each stage-2 batch.
STAGE2_PROMPTS = (
    f"{IMAGE_SLOT} Describe this image in detail.",
    f"{IMAGE_SLOT} Take a look at this image and describe what you notice.",
    f"{IMAGE_SLOT} Please provide a detailed description of the picture.",
    f"{IMAGE_SLOT} Could you describe the contents of this image for me?",
)


def fill_template(template: str, instruction: str) -> str:
    """Put an instruction in the place of `{}`."""
    return template.replace("{}", instruction, 1)


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
