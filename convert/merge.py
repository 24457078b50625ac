"""python -m convert merge | unmerge: adds LoRA to the weights it adapts, and subtracts it again.

Merging replaces W by W + alpha / rank * B A; the result is a model without LoRA. Sums are computed
and, by default, stored in float32, because rounding to a 16-bit type can lose a small adapter.
"""

import dataclasses
from pathlib import Path

from convert.formats.tensors import DTYPES
from convert.output import (
    Arrays,
    check_apart,
    refuse_quantized_merge,
    with_lora,
    write_complete_model,
)
from minigpt4_jax.checkpoint.loader import open_tensors
from minigpt4_jax.checkpoint.model_directory import Tensors, model_chain, read_config
from minigpt4_jax.checkpoint.parameters import part_of
from minigpt4_jax.errors import UserError


def merge(model_dir: Path, out: Path, dtype: str = "float32", *, base: Path | None = None) -> None:
    """Write model_dir with its adapters added to the weights, as a model without LoRA.

    dtype: of the changed matrices. base: the directory of the model's base, if that is no longer where
    model.json says. UserError: no LoRA, quantized, damaged, or `out` exists or is in a
    directory that is read.
    """
    config = read_config(model_dir)
    check_apart(out, model_chain(model_dir, base))
    if config.lora is None:
        raise UserError(f"{model_dir} has no LoRA to merge")
    refuse_quantized_merge(model_dir, config)
    tensors = open_tensors(model_dir, config, base=base)
    names = [name for name in tensors if part_of(name) != "lora"]
    merged = with_lora(names, tensors, tensors, config.lora, DTYPES[dtype])
    records = {"merged": {"file": str(model_dir)}}
    new_config = dataclasses.replace(config, lora=None)
    write_complete_model(out, new_config, merged, model_dir, records, base)
    print(f"wrote {out}: LoRA on {', '.join(config.lora.targets)} merged, in {dtype}")


def unmerge(
    model_dir: Path,
    lora_dir: Path,
    out: Path,
    dtype: str = "float32",
    *,
    base: Path | None = None,
) -> None:
    """Write model_dir, into which the adapters of lora_dir were merged, as base weights and adapters.

    base: the directory of lora_dir's base, if that is no longer where its model.json says.
    UserError: model_dir has LoRA, lora_dir has none or is for another language model; else as `merge`.
    """
    config, lora = read_config(model_dir), read_config(lora_dir).lora
    check_apart(out, [*model_chain(model_dir), *model_chain(lora_dir, base)])
    if lora is None:
        raise UserError(f"--lora: {lora_dir} has no LoRA")
    if config.lora is not None:
        raise UserError(f"{model_dir} has LoRA of its own, so none is merged into it")
    refuse_quantized_merge(model_dir, config)
    if config.llm != read_config(lora_dir).llm:
        raise UserError(f"--lora: {lora_dir} is for another language model than {model_dir}")
    tensors, adapters = open_tensors(model_dir, config), Tensors(lora_dir, base)

    def arrays() -> Arrays:
        yield from ((n, adapters[n]) for n in sorted(adapters) if part_of(n) == "lora")
        yield from with_lora(list(tensors), tensors, adapters, lora, DTYPES[dtype], subtract=True)

    records = {"unmerged": {"file": str(model_dir)}}
    write_complete_model(out, dataclasses.replace(config, lora=lora), arrays(), model_dir, records)
    print(f"wrote {out}: LoRA on {', '.join(lora.targets)} unmerged, in {dtype}")
