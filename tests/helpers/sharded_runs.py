"""Run by test_sharding.py in a process with eight virtual devices: `sharded_runs.py FOLDER`.

FOLDER holds model/, data/ and values.json, the configuration of a run. Writes FOLDER/answers.json.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

from minigpt4_jax import load
from minigpt4_jax.checkpoint import loader
from minigpt4_jax.errors import UserError
from minigpt4_jax.parallel import sharding
from minigpt4_jax.training.preemption import Stopped
from minigpt4_jax.training.trainer import train

QUESTION = "<Img><ImageHere></Img> What is this?"


def run(folder: Path) -> None:
    """Two steps on one mesh, then SIGTERM, and the rest on another."""
    values = json.loads((folder / "values.json").read_text())

    def stop(record: dict) -> None:
        if record["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        train(values | {"mesh": "data:2,fsdp:2,model:2"}, folder / "run", on_metrics=stop)
        raise AssertionError("the run was not stopped")
    except Stopped as e:
        assert e.code == 143
    train(values | {"mesh": "fsdp:4,model:-1", "accumulate": 1}, folder / "run")
    try:
        train(values | {"mesh": "data:8", "batch_size": 12}, folder / "other")
        raise AssertionError("12 rows were accepted on 8 devices")
    except UserError as e:
        assert "12 rows cannot be divided among the 8 devices" in str(e), e
    assert not (folder / "other").exists()


def answers(folder: Path, mesh: str | None) -> dict:
    """The results of every method of Model; sharded_programs.py has beam search."""
    model = load(folder / "model", "float32", mesh=mesh)
    images = sorted(str(p) for p in (folder / "data").glob("*.png"))[:3]
    options = {"max_new_tokens": 5, "temperature": 0.9, "top_k": 20}
    conversation = model.conversation()
    nll, _ = model.score(images, [QUESTION] * 3, ["red", "green", "blue blue"])
    return {
        "visual": np.asarray(model.encode_images(images)).ravel().tolist(),
        "nll": nll.tolist(),
        "greedy": model.generate(images, [QUESTION] * 3, max_new_tokens=5),
        "stream": "".join(model.stream(images[0], QUESTION, **options)),
        "turns": [
            conversation.ask("What?", images[0], max_new_tokens=5),
            conversation.ask("Where?", max_new_tokens=5),
        ],
    }


if __name__ == "__main__":
    # Load weights in chunks, as onto devices with their own memory.
    sharding.CHUNK_BYTES, loader.devices_have_own_memory = 100, lambda: True
    home = Path(sys.argv[1])
    run(home)
    found = {str(mesh): answers(home, mesh) for mesh in (None, "data:2,model:4")}
    (home / "answers.json").write_text(json.dumps(found))
