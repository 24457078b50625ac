"""What the plans of both stages of BLIP-2 have in common."""

from collections.abc import Mapping
from typing import Any

from convert.blip2_sources import check_second_names
from convert.build_plan import BuildPlan, BuildRequest, raise_problems, stored_config, unknown_keys
from convert.infer_config import vision_config
from convert.key_mapping import EVA, NATIVE
from convert.language_model import TokenizerFiles
from convert.sources import MappedCheckpoint, ParameterSource, open_checkpoint
from convert.validate import source_problems
from minigpt4_jax.checkpoint.parameters import parameter_shapes, part_of
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError


def open_vision(request: BuildRequest) -> list[MappedCheckpoint]:
    """--vision, if it is given."""
    if request.vision is None:
        return []
    return [open_checkpoint("--vision", request.vision, (EVA, NATIVE))]


def combine_sources(checkpoints: list[MappedCheckpoint]) -> dict[str, ParameterSource]:
    """Parameter -> source; later checkpoints replace earlier ones."""
    sources: dict[str, ParameterSource] = {}
    for checkpoint in checkpoints:
        sources |= checkpoint.parameters()
    for checkpoint in checkpoints:
        check_second_names(checkpoint, sources)
    return sources


def vision_values(
    checkpoints: list[MappedCheckpoint],
    sources: Mapping[str, ParameterSource],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """VisionConfig fields, from the checkpoint that the vision encoder comes from."""
    source = sources.get("vit.pos") or next(
        (s for name, s in sources.items() if name.startswith("vit.")), None
    )
    if source is None:
        raise UserError("--vision=FILE is needed (for instance eva_vit_g.pth): no file has a ViT")
    checkpoint = source.checkpoint
    if recorded := checkpoint.sizes.get("vision"):
        return dict(recorded)
    return vision_config(
        checkpoint.shapes("vit."), checkpoint.label, spare_block=checkpoint.table is EVA, scale=1,
        settings=settings,
    )  # fmt: skip


def finish_plan(
    request: BuildRequest,
    config: ModelConfig,
    checkpoints: list[MappedCheckpoint],
    sources: dict[str, ParameterSource],
    tokenizer: TokenizerFiles,
    new_part: str,
    notes: list[str],
) -> BuildPlan:
    """The checked plan. new_part: the part whose missing parameters are initialized."""
    shapes = parameter_shapes(config)
    depth = config.vision.depth
    unused = [n for n in sources if n.startswith("vit.blocks.") and int(n.split(".")[2]) >= depth]
    if unused:
        notes.append(f"vision blocks from {depth} on are not used (vision.depth={depth})")
    sources = {n: s for n, s in sources.items() if n not in unused}
    new = [n for n in shapes if n not in sources and new_part and part_of(n) == new_part]
    new += [n for n in shapes if n not in sources and new_part and n.startswith("ln_vision.")]
    if new:
        notes.append(f"{len(new)} parameters are new and must be trained ({new[0]}, ...)")
    missing = [
        _missing(name, checkpoints) for name in shapes if name not in sources and name not in new
    ]
    raise_problems([*unknown_keys(checkpoints), *missing, *source_problems(shapes, sources)])
    used = {id(source.checkpoint) for source in sources.values()}
    notes += [
        f"{c.label} is not used: a later file has all of its parameters"
        for c in checkpoints
        if id(c) not in used
    ]
    stored = stored_config(config, request, sources, notes).check()
    return BuildPlan(config, stored, tokenizer, checkpoints, shapes, sources, new, notes)


def _missing(name: str, checkpoints: list[MappedCheckpoint]) -> str:
    for checkpoint in reversed(checkpoints):
        if key := checkpoint.key_of(name):
            return f"{checkpoint.label} has no {key}"
    return f"{name} is in no file"
