"""A run's working directory: starting or continuing a run, and writing the trained model."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.checkpoint.parameters import is_stacked, layer_names
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.parallel.multihost import all_gather_json, is_multiprocess
from minigpt4_jax.storage.atomic import write_error, write_text_atomically
from minigpt4_jax.storage.paths import (
    absolute_path,
    make_directory,
    wait_until_visible,
    wrap_storage_errors,
)
from minigpt4_jax.training.checkpoints import describe_checkpoint, saved_steps
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.config_values import allowed_changes, differences, to_dict
from minigpt4_jax.training.train_step import Trainable

CONFIG, CHECKPOINTS, MODEL = "config.json", "checkpoints", "model"
BEST = "best"  # the model with the best score on a benchmark (config.eval.best)


def keep_old_defaults(workdir: Path, c: TrainConfig) -> TrainConfig:
    """The configuration of a run that was started before `data.exif` existed: its images are not rotated.
    Collective: another process may not see the file of process 0 yet.

    A working directory that cannot be read is left to `open_workdir`.
    """
    if all_gather_json(_is_without_exif(workdir))[0]:
        return replace(c, data=replace(c.data, exif=False))
    return c


def _is_without_exif(workdir: Path) -> bool:
    """Whether a run's config.json can be read and has no `data.exif`."""
    try:
        with wrap_storage_errors(workdir):
            data = json.loads((workdir / CONFIG).read_text())["config"]["data"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return isinstance(data, dict) and "exif" not in data


def open_workdir(workdir: Path, c: TrainConfig) -> list[str]:
    """Create the working directory with its config.json, or check that it holds this same run; returns
    lines about what is changed in it. `record_config` writes the changes, once they have an effect.

    A run may be given more `steps` than it was started with, also once it is finished. Its schedule is then
    that of the new total.

    UserError: it cannot be written, its run has another configuration or another model, or a new run would
    write into a directory of the model that it reads.
    """
    document = {"config": to_dict(c), "model": model_directory.fingerprint(c.model)}
    path = workdir / CONFIG
    try:
        with wrap_storage_errors(workdir):
            if not path.exists():
                _check_apart(workdir, c.model)
            make_directory(workdir)
            if path.exists():
                return _check_same_run(workdir, json.loads(path.read_text()), document)
            if any((workdir / name).exists() for name in (CHECKPOINTS, MODEL)):
                raise UserError(f"{workdir} holds a run without {CONFIG}: choose another --workdir")
            write_text_atomically(path, json.dumps(document, indent=1) + "\n")
    except OSError as e:
        raise write_error(workdir, e) from e
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}): choose another --workdir") from e
    return []


def _check_apart(workdir: Path, model: str) -> None:
    """UserError: a run would write into a directory of the model that it reads."""
    target = absolute_path(workdir)
    for folder in model_directory.model_chain(model):
        if absolute_path(folder) in (target, *target.parents):
            raise UserError(
                f"--workdir: {workdir} is in {folder}, a model directory that is read: choose another"
            )


def record_config(workdir: Path, c: TrainConfig) -> None:
    """Write what `open_workdir` has accepted to config.json, before a state is saved under it: a start
    that saves nothing leaves the run as it was. UserError: it cannot be written."""
    path = workdir / CONFIG
    try:
        with wrap_storage_errors(workdir):
            document = json.loads(path.read_text()) | {"config": to_dict(c)}
            write_text_atomically(path, json.dumps(document, indent=1) + "\n")
    except OSError as e:
        raise write_error(workdir, e) from e


def _check_same_run(workdir: Path, old: Any, new: dict[str, Any]) -> list[str]:
    """UserError if it is another run; otherwise lines about what is changed."""
    if not isinstance(old, dict) or not {"config", "model"} <= old.keys():
        raise UserError(f"{workdir / CONFIG} is not a training run's: choose another --workdir")
    if changed := differences(old["config"], new["config"]):
        raise UserError(
            f"{workdir} was started with another configuration ({'; '.join(changed)}): "
            "repeat that one to continue it, or choose another --workdir"
        )
    if old["model"] != new["model"]:
        raise UserError(
            f"{workdir} was started with other weights than {new['config']['model']} holds now"
            f"{_other_path(old['config'], new['config'])}: choose another --workdir"
        )
    messages = []
    if changed := allowed_changes(old["config"], new["config"]):
        messages.append(f"changed since the last start: {'; '.join(changed)}")
    steps, old_steps = (document["config"].get("steps", 0) for document in (new, old))
    if steps > old_steps > 0:
        schedule = new["config"]["schedule"]
        messages.append(_describe_extension(workdir, old_steps, steps, schedule))
    return messages


def _other_path(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The model that a run was started with, if it is another one by its path."""
    before = old.get("model")
    return "" if before == new["model"] else f" (its model was {before})"


def _describe_extension(workdir: Path, old_steps: int, steps: int, schedule: str) -> str:
    """The line about more steps. UserError: the run is finished and has no checkpoint to continue."""
    if (workdir / MODEL).exists() and not saved_steps(workdir / CHECKPOINTS):
        raise UserError(
            f"{workdir} is finished after {old_steps} steps and its checkpoints are gone, so it cannot "
            f"be extended to {steps}: train {workdir / MODEL} further in another --workdir"
        )
    effect = {
        "cosine": f"the cosine schedule now spans all {steps} steps, so the learning rate is that of a run "
        "of this length from here on",
        "step": "the step schedule does not depend on the number of steps",
    }[schedule]
    return f"extended from {old_steps} to {steps} steps: {effect}"


def check_is_shared(workdir: Path) -> None:
    """UserError if the processes of this run see different directories at this path. Collective."""
    path = workdir / CONFIG
    visible = wait_until_visible(path) if is_multiprocess() else path.exists()
    text = path.read_text() if visible else ""
    digests = all_gather_json(hashlib.sha256(text.encode()).hexdigest())
    other = next((i for i, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise UserError(
            f"workdir {workdir} is a different directory for process {other} than for process 0: give "
            "one that all hosts share (a network file system, a mounted bucket)"
        )


def describe_saved_state(workdir: Path) -> str:
    """What a run that ended here has saved, for messages."""
    directory = workdir / CHECKPOINTS
    try:
        with wrap_storage_errors(directory):
            steps = saved_steps(directory)
    except OSError:
        return f"what was saved before is kept in {directory}"
    return describe_checkpoint(max(steps, default=None), directory)


def is_finished(workdir: Path, c: TrainConfig) -> bool:
    """Whether the run in this directory has written its model."""
    if not (workdir / MODEL / "model.json").is_file():
        return False
    sources = model_directory.read_model_json(workdir / MODEL)["sources"]
    return bool(sources.get("training", {}).get("steps") == c.steps)


def write_trained_model(
    directory: Path,
    c: TrainConfig,
    config: ModelConfig,
    trainable: Trainable,
    result: dict[str, Any],
) -> Path:
    """Write the trained parts as a model directory, WORKDIR/model or WORKDIR/best, based on the run's
    model.

    result: recorded in model.json.
    """
    sources = {"training": {"base": c.model, **result}}
    return write_model(
        directory, config, _named_tensors(trainable), base=c.model, sources=sources, overwrite=True
    )


def _named_tensors(trainable: Trainable) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """(name, array) of each tensor, one per layer, as in a model directory."""
    for name, array in trainable.items():
        path, value = tuple(name.split(".")), np.asarray(array)
        for i, (tensor_name, _) in enumerate(layer_names(path, value.shape)):
            yield tensor_name, value[i] if is_stacked(path) else value
