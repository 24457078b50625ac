"""Chat templates in the formats of public model families, and small tokenizers that have them."""

# ruff: noqa: RUF001  (DeepSeek's tokens have fullwidth bars)
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from helpers.paths import TOKENIZER

_LOOP = "{%- for m in messages %}"
_END = "{%- endfor %}"


class Family(NamedTuple):
    """How a family writes dialogues. special: the tokens that its tokenizer splits out."""

    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    end_symbol: str  # what closes an answer
    takes_system: bool = True
    history_end: str | None = None  # what closes an earlier answer, if it is something else


def _roles(user: str, assistant: str, system: str, generation: str, head: str = "") -> str:
    """A template from expressions with m.content for each role."""
    return (
        head + _LOOP + "{%- if m.role == 'user' %}{{ " + user + " }}"
        "{%- elif m.role == 'assistant' %}{{ " + assistant + " }}"
        "{%- else %}{{ " + system + " }}{%- endif %}" + _END
        + "{%- if add_generation_prompt %}{{ " + generation + " }}{%- endif %}"
    )  # fmt: skip


def _chatml(default_system: str = "") -> str:
    head = ""
    if default_system:
        head = (
            "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\n"
            + default_system + "<|im_end|>\\n' }}{%- endif %}"
        )  # fmt: skip
    turn = "'<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n'"
    return _roles(turn, turn, turn, "'<|im_start|>assistant\\n'", head)


_MISTRAL_SYSTEM = (
    "{%- set s = '' %}{%- if messages[0].role == 'system' %}{%- set s = messages[0].content + '\\n\\n' %}"
    "{%- set messages = messages[1:] %}{%- endif %}"
)


def _mistral(before: str, after: str, answer: str) -> str:
    return (
        _MISTRAL_SYSTEM + "{{ bos_token }}" + _LOOP + "{%- if m.role == 'user' %}{{ '[INST]" + before
        + "' + (s if loop.first else '') + m.content + '" + after + "[/INST]' }}"
        "{%- else %}{{ " + answer + " + eos_token }}{%- endif %}" + _END
    )  # fmt: skip


_LLAMA3_HEADER = (
    "'<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>'"
)
_R1_ANSWER = "'<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>'"
_QWEN3_ANSWER = (
    "'<|im_start|>assistant\\n' + (m.content.split('</think>')[-1].lstrip('\\n') "
    "if not loop.last else m.content) + '<|im_end|>\\n'"
)
_QWEN3_TURN = "'<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n'"
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

FAMILIES = {
    "llama2": Family(
        "{%- if messages[0].role == 'system' %}{%- set s = '<<SYS>>\\n' + messages[0].content + "
        "'\\n<</SYS>>\\n\\n' %}{%- set messages = messages[1:] %}{%- else %}{%- set s = '' %}{%- endif %}"
        + _LOOP + "{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + (s if loop.first else '') + "
        "m.content | trim + ' [/INST]' }}{%- else %}{{ ' ' + m.content | trim + ' ' + eos_token }}"
        "{%- endif %}" + _END,
        ("<s>", "</s>"), "<s>", "</s>", "</s>",
    ),
    "llama3": Family(
        _roles(_LLAMA3_HEADER, _LLAMA3_HEADER, _LLAMA3_HEADER,
               "'<|start_header_id|>assistant<|end_header_id|>\\n\\n'", "{{ bos_token }}"),
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>",
    ),
    "mistral v1": Family(_mistral(" ", " ", "m.content"), ("<s>", "</s>"), "<s>", "</s>", "</s>"),
    "mistral v3": Family(
        _mistral(" ", "", "' ' + m.content"), ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", "</s>"
    ),
    "mistral nemo": Family(
        _mistral("", "", "m.content"), ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", "</s>"
    ),
    "qwen2": Family(
        _chatml("You are a helpful assistant."), _CHATML_TOKENS, None, "<|im_end|>", "<|im_end|>"
    ),
    "qwen3": Family(
        _roles(_QWEN3_TURN, _QWEN3_ANSWER, _QWEN3_TURN, "'<|im_start|>assistant\\n'"),
        (*_CHATML_TOKENS, "<think>", "</think>"), None, "<|im_end|>", "<|im_end|>",
    ),
    "smollm2": Family(
        _chatml("You are small."), _CHATML_TOKENS, "<|im_start|>", "<|im_end|>", "<|im_end|>"
    ),
    "zephyr": Family(
        _roles(
            "'<|user|>\\n' + m.content + eos_token + '\\n'",
            "'<|assistant|>\\n' + m.content + eos_token + '\\n'",
            "'<|system|>\\n' + m.content + eos_token + '\\n'",
            "'<|assistant|>\\n'",
        ),
        ("<s>", "</s>"), "<s>", "</s>", "</s>",
    ),
    "deepseek r1": Family(
        _roles("'<｜User｜>' + m.content", _R1_ANSWER, "m.content", "'<｜Assistant｜><think>\\n'",
               "{{ bos_token }}"),
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
    ),
    "gemma": Family(
        _roles(
            "'<start_of_turn>user\\n' + m.content | trim + '<end_of_turn>\\n'",
            "'<start_of_turn>model\\n' + m.content | trim + '<end_of_turn>\\n'",
            "raise_exception('System role not supported')",
            "'<start_of_turn>model\\n'",
            "{{ bos_token }}",
        ),
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>", "<end_of_turn>",
        takes_system=False,
    ),
    "phi3": Family(
        _LOOP + "{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}" + _END
        + "{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{%- else %}{{ eos_token }}{%- endif %}",
        ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        None, "<|endoftext|>", "<|end|>",
    ),
}  # fmt: skip

_STRIPPED = "{{ m.content.strip() + '\\n\\n' }}"
# Ways of writing dialogues that the families above do not have.
UNUSUAL = {
    "nothing closes an answer": Family(
        _LOOP + "{{ '### ' + m.role.title() + ':\\n' }}" + _STRIPPED + _END
        + "{%- if add_generation_prompt %}{{ '### Assistant:\\n' }}{%- endif %}",
        ("<s>", "</s>"), "<s>", "</s>", "</s>", history_end="",
    ),
    "the next question closes an answer": Family(
        "[gMASK]<sop>" + _LOOP + "{{ '<|' + m.role + '|>\\n' + m.content }}" + _END
        + "{%- if add_generation_prompt %}<|assistant|>{%- endif %}",
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>"),
        None, "<|endoftext|>", "<|user|>",
    ),
    "the last answer is closed by another token": Family(
        _LOOP + "{{ '<|start|>' + m.role + '<|message|>' + m.content }}"
        "{{ '<|return|>' if m.role == 'assistant' and loop.last else '<|end|>' }}" + _END
        + "{%- if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{%- endif %}",
        ("<|start|>", "<|message|>", "<|end|>", "<|return|>"), None, "<|return|>", "<|return|>",
        history_end="",
    ),
    "system in the last question": Family(
        "{%- set ns = namespace(s='') %}{{ bos_token }}" + _LOOP + "{%- if m.role == 'system' %}"
        "{%- set ns.s = m.content + '\\n\\n' %}{%- elif m.role == 'user' %}{{ '[INST] ' + "
        "(ns.s if loop.last else '') + m.content + '[/INST]' }}{%- else %}"
        "{{ ' ' + m.content | trim + eos_token }}{%- endif %}" + _END,
        ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", "</s>",
    ),
    "tools, dates, filters": Family(
        "{%- if tools is defined and tools %}{{ '<|tools|>' + tools | tojson }}{%- endif %}"
        "{%- set s = 'Knowledge until ' + strftime_now('%Y') %}{%- if messages[0]['role'] == 'system' %}"
        "{%- set s = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}{%- endif %}"
        "{{ '<|role|>system<|text|>' + s + eos_token + '\\n' }}" + _LOOP
        + "{%- if (m.role == 'assistant') == (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{%- endif %}"
        "{{ '<|role|>' + (m.role | upper) + '<|text|>' + m.content + eos_token + '\\n' }}"
        + _END + "{%- if add_generation_prompt %}{{ '<|role|>ASSISTANT<|text|>' }}{%- endif %}",
        ("<|role|>", "<|text|>", "<|tools|>", "<|endoftext|>"), "<|endoftext|>", "<|endoftext|>",
        "<|endoftext|>",
    ),
}  # fmt: skip

# (system, turns); an answer of None is to be generated. `<ImageHere>` marks images.
DIALOGUES: dict[str, tuple[str | None, list[tuple[str, str | None]]]] = {
    "one question": (None, [("What is in the picture?", None)]),
    "system": ("Answer in one word.", [("What is it?", None)]),
    "several turns": (None, [("What is it?", "A cat."), ("Which colour?", "Red."), ("Sure?", None)]),
    "system, several turns": ("Be brief.", [("What is it?", "A cat."), ("Which colour?", None)]),
    "images": (
        None,
        [("<Img><ImageHere></Img> What is it?", "A cat."), ("And <Img><ImageHere></Img> here?", None)],
    ),
    "unicode, spaces": (None, [("Où est  le\nchat 🐈 ?", "Là-bas, 在這裡。"), ("  Merci ", None)]),
    "empty answer": (None, [("What is it?", ""), ("Say it again", None)]),
}  # fmt: skip


def write_tokenizer(folder: Path, family: Family) -> Path:
    """A byte-level BPE tokenizer with a family's special tokens and template, as transformers saves it."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(family.special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    model.train_from_iterator(
        ["What is in the picture? A cat is in it.", "user assistant"], trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=family.bos, eos_token=family.eos,
        additional_special_tokens=[
            t for t in family.special if t not in (family.bos, family.eos)
        ],
    )  # fmt: skip
    fast.chat_template = family.template
    fast.save_pretrained(str(folder))
    return folder


def write_sentencepiece_tokenizer(folder: Path, family: Family) -> Path:
    """The small LLaMA tokenizer.model with a family's special tokens added, and its template."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes((TOKENIZER / "tokenizer.model").read_bytes())
    pieces = 785
    added = [t for t in family.special if t not in ("<s>", "</s>")]
    decoder = {
        str(pieces + n): {
            "content": t, "special": True, "lstrip": False, "rstrip": False, "normalized": False,
            "single_word": False,
        }
        for n, t in enumerate(added)
    }  # fmt: skip
    config = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": family.bos or "<s>",
        "eos_token": family.eos, "unk_token": "<unk>", "added_tokens_decoder": decoder,
        "chat_template": family.template, "add_bos_token": True, "legacy": True,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def messages(system: str | None, turns: Sequence[tuple[str, str | None]]) -> list[dict[str, str]]:
    """A dialogue as transformers takes it."""
    found = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        found.append({"role": "user", "content": question})
        found += [] if answer is None else [{"role": "assistant", "content": answer}]
    return found
