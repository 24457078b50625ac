"""Full-size programs, compiled by `python -m minigpt4_jax.compile`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def compiled(folder: Path, *arguments: str) -> dict[str, Any]:
    """The record of one program, as the command writes it."""
    json_path = folder / "figures.json"
    command = [sys.executable, "-m", "minigpt4_jax.compile", *arguments, f"--json={json_path}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
    (record,) = json.loads(json_path.read_text())
    return record
