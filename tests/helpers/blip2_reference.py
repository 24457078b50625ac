"""Models built from the reference checkpoints of BLIP-2, and the dumps that LAVIS' code made of them."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.paths import REFERENCE, process_folder

FOLDER = REFERENCE / "blip2"
CHECKPOINTS, DUMPS = FOLDER / "checkpoints", FOLDER / "dumps"
NEEDS_BLIP2 = pytest.mark.skipif(not DUMPS.is_dir(), reason="../shared/reference/blip2 is not here")
HEADS = ["vision.heads=4", "qformer.heads=4"]
BERT = CHECKPOINTS / "bert-base-uncased"
VIT = CHECKPOINTS / "eva_vit_g.pth"

# name -> arguments of a build; see the reference's README
BUILDS = {
    "pretrain": ("blip2-qformer", {"vision": VIT, "checkpoint": "blip2_pretrained.pth", "tokenizer": BERT}),
    "coco": ("blip2-qformer", {"checkpoint": "blip2_finetune_coco.pth", "tokenizer": BERT}),
    "hf-itm": ("blip2-qformer", {"checkpoint": "hf/itm_coco"}),
    "opt": ("blip2-opt", {"vision": VIT, "checkpoint": "blip2_pretrained_opt.pth", "llm": "opt"}),
    "opt-caption": ("blip2-opt", {"checkpoint": "blip2_caption_opt.pth", "llm": "opt"}),
    "flant5": (
        "blip2-flant5", {"vision": VIT, "checkpoint": "blip2_pretrained_flant5.pth", "llm": "flan-t5"},
    ),
    "flant5-caption": ("blip2-flant5", {"checkpoint": "blip2_caption_flant5.pth", "llm": "flan-t5"}),
    "hf-opt": ("blip2-opt", {"checkpoint": "hf/opt"}),
    "hf-flant5": ("blip2-flant5", {"checkpoint": "hf/flan-t5"}),
}  # fmt: skip


def build(name: str, out: Path) -> Path:
    """The model directory out/NAME, made by `convert build`."""
    return build_from(*BUILDS[name], out / name)


@cache
def shared(name: str) -> Path:
    """As `build`, made once in a process. Tests do not change it."""
    return build(name, process_folder())


@cache
def load(name: str) -> Any:
    """The float32 model of `shared`, loaded once in a process."""
    import minigpt4_jax

    return minigpt4_jax.load(shared(name), "float32")


def build_from(variant: str, arguments: dict, out: Path) -> Path:
    """A model directory made by `convert build`; paths are relative to the checkpoints."""
    from convert.build import build
    from convert.build_plan import BuildRequest

    paths = {key: CHECKPOINTS / value for key, value in arguments.items()}
    build(BuildRequest(variant=variant, out=out, settings=HEADS, **({"llm": None} | paths)))
    return out


def dump(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays and the texts of a dump."""
    json_file = DUMPS / f"{name}.json"
    arrays = DUMPS / f"{name}.npz"
    return (
        dict(np.load(arrays)) if arrays.is_file() else {},
        json.loads(json_file.read_text()) if json_file.is_file() else {},
    )


def pictures() -> list[np.ndarray]:
    """The six images of the dumps, uint8 [H, W, 3]."""
    arrays, _ = dump("pixels")
    return [arrays[f"source_{i}"] for i in range(6)]


def ended(ids: list[int], end: int) -> list[int]:
    """Ids up to the first `end`, or all of them."""
    return ids[: ids.index(end) + 1] if end in ids else ids


class _Recorded(Exception):
    """Ends a call whose requests are known."""


def together(
    model: Any, calls: Sequence[Callable[[], Any]], method: str = "answer_requests"
) -> list[Any]:
    """The results of calls that each ask a method of the model once, `answer_requests` or `answer_all`.

    The requests of all calls are answered at once: those with equally many beams share a program,
    whatever their other options are, so that far fewer programs are compiled.
    """
    answer = getattr(model, method)
    asked: list[list] = []

    def record(requests, *_):
        asked.append(list(requests))
        raise _Recorded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, method, record)
        for call in calls:
            with pytest.raises(_Recorded):
                call()
    flat = [request for requests in asked for request in requests]
    answers = iter(_answer_searched_apart(answer, flat))
    of_calls = [[next(answers) for _ in requests] for requests in asked]
    results = []
    for call, found in zip(calls, of_calls, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, method, lambda *_, found=found: found)
            results.append(call())
    return results


def _answer_searched_apart(answer: Callable[..., list], asked: list) -> list:
    """The answers to requests or prepared prompts, in order; those with beams in a call of their own."""
    results: list = [None] * len(asked)
    for searched in (False, True):
        chosen = [
            i for i, prompt in enumerate(asked)
            if (getattr(prompt, "request", prompt).beam_search.num_beams > 1) == searched
        ]  # fmt: skip
        found = answer([asked[i] for i in chosen], batch_size=512)
        for i, outputs in zip(chosen, found, strict=True):
            results[i] = outputs
    return results
