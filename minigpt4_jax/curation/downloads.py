"""The shards that img2dataset downloaded: what its statistics say, and what is missing.

For every shard img2dataset writes 00000.tar and 00000_stats.json with "count", "successes",
"failed_to_download", "failed_to_resize" and "status_dict".
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt4_jax.errors import UserError

_SHARD = re.compile(r"(\d{5,})\.tar")
_STATS = re.compile(r"(\d{5,})_stats\.json")


@dataclass
class Downloads:
    """What is known of a folder of shards.

    missing: numbers of shards between 0 and the last one (or the expected number) without a tar. unfinished:
    tars without statistics, of a download that still runs or was interrupted. causes: why images are missing.
    """

    shards: int = 0
    missing: list[int] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    rows: int = 0
    successes: int = 0
    causes: Counter[str] = field(default_factory=Counter)


def read_downloads(folder: Path, expected: int | None = None) -> Downloads:
    """expected: number of shards. UserError: no shard, damaged statistics."""
    names = {match[1]: path for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name))}
    stats = {match[1]: path for path in folder.iterdir() if (match := _STATS.fullmatch(path.name))}
    if not names:
        raise UserError(
            f"{folder}: has no shard such as 00000.tar; expected img2dataset's output folder"
        )
    found = Downloads(shards=len(names))
    numbers = {int(name) for name in names}
    last = expected if expected is not None else max(numbers | {int(name) for name in stats}) + 1
    found.missing = sorted({*range(last)} - numbers)
    found.unfinished = sorted(names[name].name for name in names if name not in stats)
    for path in stats.values():
        _add(found, path)
    return found


def _add(found: Downloads, path: Path) -> None:
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found.rows += int(fields["count"])
        found.successes += int(fields["successes"])
        statuses = fields.get("status_dict") or {}
        found.causes.update({k: int(v) for k, v in statuses.items() if k != "success"})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path}: is no statistics file of img2dataset ({type(e).__name__}: {e})"
        ) from None
