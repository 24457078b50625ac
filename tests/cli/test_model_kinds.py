"""Kinds of models that a command cannot use are refused before anything is loaded."""

import dataclasses
import json
import sys

import pytest

from minigpt4_jax.aot.presets import PRESETS
from minigpt4_jax.cli import batch, chat, curate, demo, serve
from minigpt4_jax.errors import UserError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories with a configuration and no weights, by variant."""
    t5 = PRESETS["blip2-flant5xl"]
    assert t5.qformer is not None
    qformer = dataclasses.replace(t5.qformer, vocab=30523, max_positions=512)
    configs = [
        PRESETS["blip2-stage1"],
        dataclasses.replace(t5, variant="instructblip-flant5", qformer=qformer),
    ]
    root = tmp_path_factory.mktemp("kinds")
    for config in configs:
        (root / config.variant).mkdir()
        content = {"format": 1, "config": dataclasses.asdict(config)}
        (root / config.variant / "model.json").write_text(json.dumps(content))
    (root / "rows.jsonl").write_text('{"question": "what?"}\n')
    return root


COMMANDS = {
    "serve": (serve.main, []),
    "serve --ray": (serve.main, ["--ray=local"]),
    "demo": (demo.main, []),
    "describe": (lambda argv: curate.main(["describe", *argv]), ["--images={root}", "--output={root}/o"]),
    "batch": (batch.main, ["--input={root}/rows.jsonl", "--output={root}/out.jsonl"]),
    "batch --ray": (batch.main, ["--ray=local", "--input={root}/rows.jsonl", "--output={root}/out"]),
    "chat": (chat.main, []),
}  # fmt: skip


CASES = [("blip2-qformer", name) for name in COMMANDS]
CASES += [("instructblip-flant5", name) for name in ("serve", "serve --ray", "demo", "describe")]


@pytest.mark.parametrize(("variant", "command"), CASES)
def test_kinds_that_are_refused(models, variant, command, monkeypatch):
    main, options = COMMANDS[command]
    monkeypatch.setitem(sys.modules, "ray", None)  # no cluster is started for it
    argv = [f"--model={models / variant}", *(option.format(root=models) for option in options)]
    words = "no language model" if variant == "blip2-qformer" else "anew for every question"
    with pytest.raises(UserError, match=words):
        main(argv)
    assert not list(models.glob("o*"))
