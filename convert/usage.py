"""What is needed to use a model: memory, context, the prompt of a question, commands to try next."""

import dataclasses
import json
import math
import shlex
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from minigpt4_jax.checkpoint.loader import DTYPES, parameter_dtype
from minigpt4_jax.checkpoint.model_directory import tokenizer_dir
from minigpt4_jax.checkpoint.parameters import abstract_model
from minigpt4_jax.config import IMAGE, QUANTIZATIONS, ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import chat_format, with_images
from minigpt4_jax.processing.sequences import (
    CHAT_CONTEXT,
    build_row,
    prompt_tokens,
    training_prompt,
)
from minigpt4_jax.processing.tokenizer import load_tokenizer
from minigpt4_jax.utils.text import format_bytes

QUESTION = "What is in this image?"


def describe_usage(
    model_dir: Path, config: ModelConfig, base: Path | None = None
) -> dict[str, Any]:
    """The `usage` section of `convert inspect --json`. base: of `model_dir`, if it was moved."""
    return {
        "memory": _memory(config),
        "context": {
            "language_model": config.llm.max_length,
            "chat": min(CHAT_CONTEXT, config.llm.max_length),
            "image": config.visual_tokens,
        },
        "template": _template(model_dir, config, base),
        "commands": commands(model_dir, config) if base is None else _pack(model_dir, base),
    }


def _memory(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Precision -> bytes of the weights, and of the key-value cache for 1,000 tokens of one row.

    The cache is in the dtype of the weights, bfloat16 for quantized ones. A model that is stored
    quantized has only its own scheme.
    """
    cached = 1000 * config.llm.layers * config.llm.kv_heads * config.llm.head_dim * 2
    memory = {}
    if config.quantize is None:
        for name in DTYPES:
            dtype = jnp.dtype(DTYPES[name])
            memory[name] = {
                "weights": weight_bytes(config, dtype),
                "cache_per_1000_tokens": cached * dtype.itemsize,
            }
    schemes = QUANTIZATIONS if config.quantize is None else (config.quantize,)
    for scheme in () if config.is_stage1 else schemes:  # which has no matrices to quantize
        memory[scheme] = {
            "weights": weight_bytes(
                dataclasses.replace(config, quantize=scheme), jnp.dtype(jnp.bfloat16)
            ),
            "cache_per_1000_tokens": cached * 2,
        }
    return memory


def weight_bytes(config: ModelConfig, dtype: jnp.dtype) -> int:
    """Bytes of the parameters as `load` keeps them in memory for `dtype`."""
    total = 0
    for path, leaf in nnx.to_flat_state(nnx.state(abstract_model(config))):
        stored = leaf.dtype
        if not jnp.issubdtype(stored, jnp.integer):
            stored = parameter_dtype(path, dtype)
        total += math.prod(leaf.shape) * jnp.dtype(stored).itemsize
    return total


def _template(model_dir: Path, config: ModelConfig, base: Path | None) -> dict[str, Any]:
    """The prompt of QUESTION about one image as chat renders it, with its ids, and the text that
    closes an answer; {"error": MESSAGE} if there is none or the tokenizer cannot be read.

    `training_prompt` is there if training renders another one. Visual tokens have the id -1.
    """
    if config.is_stage1:
        return {"error": f"{config.variant} has no language model, so it answers no questions"}
    try:
        tokenizer = load_tokenizer(tokenizer_dir(model_dir, base), config.tokenizer.kind)
        question = with_images(QUESTION, 1)
        prompt = chat_format(config, tokenizer).render([(question, None)])
        ids = prompt_tokens(tokenizer, config, prompt, images=1)
        training = training_prompt(tokenizer, config, question)
        row = build_row(tokenizer, config, training, "", images=1)
    except UserError as e:
        return {"error": str(e)}
    answer = row.label_positions[0] if row.label_positions else len(row.tokens)
    template = {
        "name": "tokenizer" if config.tokenizer.chat_template else config.chat_template,
        "prompt": str(prompt),
        "ids": ids,
        "end": config.end_symbol,
        "end_ids": row.tokens[answer:],
    }
    if row.tokens[:answer] != ids:
        template |= {"training_prompt": str(training), "training_ids": row.tokens[:answer]}
    return template


def commands(model_dir: Path, config: ModelConfig) -> dict[str, str]:
    """Commands to try next, with this directory filled in: of those that this kind of model can do."""
    model, question = shlex.quote(str(model_dir)), shlex.quote(QUESTION)
    if config.is_stage1:
        return _stage1_commands(model_dir, config)
    lines = {
        "chat": f"python -m minigpt4_jax.chat --model={model} --image=photo.jpg --prompt={question}",
        "batch": f"python -m minigpt4_jax.batch --model={model} --input=rows.jsonl "
        f"--output=answers.jsonl --prompt={question}",
    }
    if config.reads_instruction:  # which is not trained
        return lines | {"python": _python(model_dir, f'answer(["photo.jpg"], "{QUESTION}")')}
    return lines | {
        "train": f"python -m minigpt4_jax.train --config=finetune --workdir=runs/mine "
        f"--config.model={model} --config.data.path=rows.jsonl"
    }


def _pack(model_dir: Path, base: Path) -> dict[str, str]:
    """The command for a model whose base was moved, which training does not find."""
    paths = f"--model={shlex.quote(str(model_dir))} --base={shlex.quote(str(base))}"
    return {"pack": f"python -m convert pack {paths} --out=NEW"}


def _stage1_commands(model_dir: Path, config: ModelConfig) -> dict[str, str]:
    """Those of a model without a language model."""
    lines = {}
    if config.qformer is not None and config.qformer.itc_width:
        lines["compare"] = _python(model_dir, 'itm_scores(["photo.jpg"], ["a dog", "a cat"])')
    if config.qformer is not None and config.qformer.lm_head:
        lines["caption"] = _python(model_dir, 'caption(["photo.jpg"])')
    lines["train"] = (
        f"python -m minigpt4_jax.train --config=blip2_stage1 --workdir=runs/mine "
        f"--config.model={shlex.quote(str(model_dir))} --config.data.path=rows.jsonl"
    )
    return lines


def _python(model_dir: Path, call: str) -> str:
    """A command that prints the result of a method of the model."""
    path = json.dumps(
        str(model_dir), ensure_ascii=False
    )  # in double quotes, as single ones are the shell's
    code = f"import minigpt4_jax; print(minigpt4_jax.load({path}).{call})"
    return f"python -c {shlex.quote(code)}"


def usage_lines(usage: dict[str, Any]) -> list[str]:
    """The section as text."""
    lines = ["usage", f"  {'memory':12}{'weights':>10}{'cache per 1,000 tokens':>26}"]
    for precision, size in usage["memory"].items():
        weights, cache = (format_bytes(n) for n in size.values())
        lines.append(f"  {precision:12}{weights:>10}{cache:>26}")
    context = usage["context"]
    lines.append(
        f"  context     {context['language_model']:,} tokens, of which chat uses {context['chat']:,}; an "
        f"image takes {context['image']}"
    )
    lines += _template_lines(usage["template"])
    lines += [f"  {name:12}{command}" for name, command in usage["commands"].items()]
    return lines


def _template_lines(template: dict[str, Any]) -> list[str]:
    if error := template.get("error"):
        return [f"  template    cannot be rendered: {error}"]
    lines = [
        f"  prompt      {template['prompt']!r} ({template['name']})",
        f"  its ids     {format_ids(template['ids'])}",
    ]
    if "training_prompt" in template:
        lines += [
            f"  in training {template['training_prompt']!r}",
            f"  its ids     {format_ids(template['training_ids'])}",
        ]
    return [*lines, f"  answer end  {template['end']!r}: {format_ids(template['end_ids'])}"]


def format_ids(ids: list[int]) -> str:
    """Ids with a run of visual tokens written as [IMAGE x N]."""
    words: list[str] = []
    count = 0
    for token in [*ids, None]:
        if token == IMAGE:
            count += 1
            continue
        if count:
            words.append(f"[IMAGE x {count}]")
            count = 0
        if token is not None:
            words.append(str(token))
    return " ".join(words)
