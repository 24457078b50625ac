"""Chooses a new model's prompt format: its tokenizer's own chat template, or the variant's."""

from typing import Any

from convert.overrides import Variant, variant_with_chat_template
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import (
    CHAT_TEMPLATES,
    TOKENIZER_TEMPLATE,
    ChatTemplate,
    TokenizerChatTemplate,
    known_format,
)
from minigpt4_jax.processing.tokenizer import HfTokenizer

_LLAMA2_SYSTEM = "<<SYS>>"  # in Llama 2's chat template alone


def wants_tokenizer_template(
    variant: Variant, template: str, settings: dict[str, Any], *, llama: bool
) -> bool:
    """Whether a model's prompts are to be rendered by its tokenizer's chat template.

    template: the Jinja source, "" if there is none. llama: whether the model is a LLaMA. The released
    variants were trained with formats of their own on Llama 2 and Vicuna; with these language models they
    keep them. --set chat_template=NAME decides otherwise.
    """
    if chosen := settings.get("chat_template"):
        return bool(chosen == TOKENIZER_TEMPLATE)
    if "prompt_template" in settings or not template:
        return False
    if not llama:
        return True
    if variant.chat_template == "vicuna0":
        return not ("USER:" in template and "ASSISTANT:" in template)
    return _LLAMA2_SYSTEM not in template


def tokenizer_format(tokenizer: HfTokenizer) -> dict[str, str]:
    """ModelConfig fields of a model that uses its tokenizer's chat template.

    UserError: no template, or one that cannot be used.
    """
    if not tokenizer.has_chat_template:
        raise UserError("the tokenizer has no chat template")
    template = TokenizerChatTemplate(tokenizer)
    prompt = template.render([("{}", None)])
    if prompt.count("{}") != 1:
        raise UserError(f"the chat template does not write the question once: {prompt!r}")
    return {
        "chat_template": known_format(template),
        "prompt_template": prompt,
        "end_symbol": template.end_symbol,
    }


def string_format(variant: Variant, settings: dict[str, Any]) -> dict[str, str]:
    """ModelConfig fields of a model that uses one of the formats in CHAT_TEMPLATES.

    By default the variant's; --set chat_template=NAME chooses another.
    """
    name = settings.get("chat_template", variant.chat_template)
    if "prompt_template" in settings and "chat_template" not in settings:
        name = variant.chat_template
    original = variant_with_chat_template(name)
    if original is None and name in CHAT_TEMPLATES:
        template: ChatTemplate = CHAT_TEMPLATES[name]
        return {
            "chat_template": name,
            "prompt_template": template.render([("{}", None)]),
            "end_symbol": template.stop[0],
        }
    original = original or variant
    return {
        "chat_template": name,
        "prompt_template": original.prompt_template,
        "end_symbol": original.end_symbol,
    }
