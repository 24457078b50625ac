"""A run's directory: begun, continued or refused; and the model it holds at the end."""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.checkpoint.model_directory import bucket_errors_as_user_errors
from minigpt4_jax.checkpoint.parameters import STACKED
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.config import LoraConfig, ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.parallel.multihost import all_gather_json, is_multiprocess
from minigpt4_jax.storage.atomic import write_error, write_text_atomically
from minigpt4_jax.storage.paths import file_size, make_directory, read_range, wrap_storage_errors
from minigpt4_jax.training.checkpoints import saved_steps
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.config_values import differences, to_dict
from minigpt4_jax.training.train_step import Trainable

CONFIG, CHECKPOINTS, MODEL = "config.json", "checkpoints", "model"
_APPEARS = 10.0  # seconds until a file of one host is seen by the others
_HASHED_BYTES = 1 << 20  # of each file of the model: tells models apart in milliseconds


def open_workdir(workdir: Path, c: TrainConfig) -> None:
    """Create the run's directory with its config.json, or check that it holds this same run.

    UserError: it is not writable, or was begun with another configuration or another model.
    """
    now = {"config": to_dict(c), "model": fingerprint(c.model)}
    path = workdir / CONFIG
    try:
        with wrap_storage_errors(workdir):
            make_directory(workdir)
            if path.exists():
                _check_same(workdir, json.loads(path.read_text()), now)
            elif any((workdir / name).exists() for name in (CHECKPOINTS, MODEL)):
                raise UserError(f"{workdir} holds a run without {CONFIG}: choose another --workdir")
            write_text_atomically(path, json.dumps(now, indent=1) + "\n")
    except OSError as e:
        raise write_error(workdir, e) from e
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}): choose another --workdir") from e


def check_shared(workdir: Path) -> None:
    """UserError where the processes of this run see different folders by this path."""
    path, until = workdir / CONFIG, time.monotonic() + _APPEARS
    while is_multiprocess() and not path.exists() and time.monotonic() < until:
        time.sleep(0.1)  # network file systems may take a moment
    text = path.read_text() if path.exists() else ""
    seen = all_gather_json(hashlib.sha256(text.encode()).hexdigest())
    other = [process for process, digest in enumerate(seen) if digest != seen[0]]
    if other:
        raise UserError(
            f"workdir {workdir} is another folder for process {other[0]} than for process 0: give "
            "one that all hosts share (a network file system, a mounted bucket)"
        )


def describe_saved_state(workdir: Path) -> str:
    """What is left of a run that ended here."""
    folder = workdir / CHECKPOINTS
    try:
        with wrap_storage_errors(folder):
            steps = saved_steps(folder)
    except OSError:
        return f"what was saved before is kept in {folder}"
    if not steps:
        return "no checkpoint was written yet"
    return f"the last good checkpoint, of step {max(steps)}, is kept in {folder}"


def is_done(workdir: Path, c: TrainConfig) -> bool:
    """Whether the run in this directory has written its model."""
    if not (workdir / MODEL / "model.json").is_file():
        return False
    written = model_directory.read_model_json(workdir / MODEL)["sources"].get("training", {})
    return written.get("steps") == c.steps


def _check_same(workdir: Path, old: Any, now: dict[str, Any]) -> None:
    if not isinstance(old, dict) or not {"config", "model"} <= old.keys():
        raise UserError(f"{workdir / CONFIG} is not a training run's: choose another --workdir")
    if changed := differences(old["config"], now["config"]):
        raise UserError(
            f"{workdir} was begun with another configuration ({'; '.join(changed)}): "
            "repeat that one to continue it, or choose another --workdir"
        )
    if old["model"] != now["model"]:
        raise UserError(
            f"{workdir} was begun with other weights than {now['config']['model']} holds now: "
            "choose another --workdir"
        )


def fingerprint(model_dir: str) -> str:
    """A short name for a model directory's content: configuration, and the head of every file."""
    digest = hashlib.sha256()
    for folder in model_directory.model_chain(model_dir):
        document = model_directory.read_model_json(folder)
        digest.update(json.dumps(document["config"], sort_keys=True).encode())
        with bucket_errors_as_user_errors(folder):
            for path in sorted(folder.glob("*.safetensors")):
                digest.update(f"{path.name} {file_size(path)}".encode())
                digest.update(read_range(path, 0, _HASHED_BYTES))
    return digest.hexdigest()[:16]


def model_config(c: TrainConfig) -> ModelConfig:
    """The model's configuration with the run's changes. UserError when it is not the model that the
    run's configuration is for."""
    config = model_directory.read_config(c.model)
    if c.variant and config.variant != c.variant:
        raise UserError(
            f"{c.model} is a {config.variant} model and this configuration is for {c.variant}: "
            "choose another (for instance --config=stage2:llama2), or set --config.variant="
        )
    if c.llm_width and config.llm.width != c.llm_width:
        raise UserError(
            f"{c.model} has a language model of width {config.llm.width} and this configuration is "
            f"for {c.llm_width}: leave out the :argument, or set --config.llm_width=0"
        )
    return adjusted(config, c, c.model)


def adjusted(config: ModelConfig, c: TrainConfig, model: str) -> ModelConfig:
    """A model's configuration with the run's changes. model: its name in messages."""
    changes: dict[str, Any] = {
        name: getattr(c, name)
        for name in ("prompt_template", "end_symbol", "max_text_length")
        if getattr(c, name)
    }
    if config.tokenizer.chat_template and {"prompt_template", "end_symbol"} & changes.keys():
        # The run's own format replaces the tokenizer's chat template.
        tokenizer = dataclasses.replace(config.tokenizer, chat_template=False)
        changes |= {"tokenizer": tokenizer, "chat_template": "training"}
    return dataclasses.replace(config, lora=_lora(c, config.lora, model), **changes).check()


def _lora(c: TrainConfig, have: LoraConfig | None, model: str) -> LoraConfig | None:
    """The adapters of the run: the model's, or new ones. UserError when the choice is another."""
    wish = c.lora
    given: dict[str, Any] = {"rank": wish.rank, "alpha": wish.alpha, "targets": wish.targets}
    given = {name: value for name, value in given.items() if value}
    dropout: dict[str, Any] = {"dropout": wish.dropout} if wish.dropout >= 0 else {}
    if have is None:
        if wish.rank == 0 and (given or dropout):
            name = next(iter(given | dropout))
            raise UserError(
                f"config.lora.{name} is given, but {model} has no LoRA: give config.lora.rank "
                "too, and it gets new adapters"
            )
        return LoraConfig(**given, **dropout) if wish.rank else None
    for name, value in given.items():
        own = getattr(have, name)
        if (sorted(value) != sorted(own)) if name == "targets" else value != own:
            raise UserError(
                f"config.lora.{name} is {value!r}, and the adapters of {model} have {own!r}: "
                "leave it out, or begin with a model without LoRA"
            )
    return dataclasses.replace(have, **dropout)


def write_trained(
    workdir: Path, c: TrainConfig, config: ModelConfig, trainable: Trainable, result: dict[str, Any]
) -> Path:
    """Write the trained parts as the model directory WORKDIR/model, on the base they belong to."""
    training = {"training": {"base": c.model, **result}}
    return write_model(
        workdir / MODEL, config, _tensors(trainable), base=c.model, sources=training, overwrite=True
    )


def _tensors(trainable: Trainable) -> Any:
    """(name, array) with one entry a layer, as a model directory has them."""
    for name, array in trainable.items():
        path, value = tuple(name.split(".")), np.asarray(array)
        if path[:2] in STACKED:
            rest = ".".join(path[2:])
            for i, layer in enumerate(value):
                yield f"{path[0]}.{path[1]}.{i}.{rest}", layer
        else:
            yield name, value
