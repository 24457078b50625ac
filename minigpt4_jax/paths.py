"""Paths that a user gave: local ones."""

import re
from pathlib import Path

from minigpt4_jax.errors import UserError

_REMOTE = re.compile(r"[a-z][a-z0-9+.-]+:/")  # gs://bucket, and gs:/bucket as pathlib writes it


def local_path(name: str, path: Path | str) -> Path:
    """`path`, unless it is an address such as gs://bucket/run: pathlib would make a folder "gs:" of
    that. UserError; `name` says there what the path is of."""
    if _REMOTE.match(str(path)):
        raise UserError(
            f"{name} {path} is an address and only local paths work: mount the bucket (gs://: with "
            "gcsfuse, s3://: with mountpoint-s3) and give the folder it is mounted at"
        )
    return Path(path)
