"""Models on the Hugging Face hub: their ids, their download into huggingface_hub's cache, and the id
that a file in that cache came from.

An id is ORG/NAME, with @REVISION (a branch, tag or commit) and /FILE or :QUANTIZATION if wanted; hf://
may stand before it. A local path of the same name is preferred. HF_HOME, HF_ENDPOINT, HF_TOKEN and
HF_HUB_OFFLINE have their usual effect.
"""

import contextlib
import errno
import functools
import itertools
import logging
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.hub_files import (
    Listing,
    Selection,
    select_file,
    select_gguf,
    select_language_model,
    select_model_directory,
    select_tokenizer,
    select_whole_model,
)
from minigpt4_jax.utils.text import one_line

NOT_FOUND = "does not exist, and is not a Hugging Face model id (ORG/NAME or ORG/NAME@REVISION)"

_URI = re.compile(r"hf:/+(.*)", re.DOTALL)  # also hf:/org/name, as pathlib writes it
_NAME = r"[A-Za-z0-9_](?:[\w.-]{0,94}\w)?"
_ID = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})"
    r"(?:@(?P<revision>refs/[\w.-]+/[\w.-]+|[\w.+-]+))?"
    r"(?:/(?P<file>[^:@]+\.(?:gguf|safetensors|pth|pt|bin))|:(?P<tag>\w+))?",
    re.ASCII,
)
_WEIGHT_FILE = re.compile(r".*\.(gguf|safetensors|pth|pt|bin|ckpt|json)", re.IGNORECASE | re.DOTALL)
_LIBRARIES = {"huggingface_hub", "httpx", "httpx2", "httpcore", "hf_xet"}  # whose errors are caught
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

Select = Callable[[Listing], Selection]

_log = logging.getLogger(__name__)


class HubId(NamedTuple):
    """A model repository on the hub, at a revision; perhaps one file in it, or one GGUF file by type."""

    repo: str  # ORG/NAME
    revision: str | None = None
    file: str | None = None
    tag: str | None = None

    @property
    def repository(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "")

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return self.repository + file + (f":{self.tag}" if self.tag else "")


def parse_hub_id(path: Path | str) -> HubId | None:
    """The hub id that is meant by what a user gave as a path; None if it is a local path or in a bucket.

    Whatever exists locally is a path, and so are names of weight files such as weights/model.gguf.
    UserError: hf:// is followed by something else than an id.
    """
    text = str(path)
    uri = _URI.fullmatch(text)
    if uri is None and (_WEIGHT_FILE.fullmatch(text) and text.count("/") < 2):
        return None
    match = _ID.fullmatch(uri[1] if uri else text)
    if match is None or "--" in match["repo"] or ".." in match["repo"]:
        if uri is not None:
            raise UserError(f"{text}: expected hf://ORG/NAME, hf://ORG/NAME@REVISION or .../FILE")
        return None
    if uri is None and Path(text).exists():
        return None
    return HubId(**match.groupdict())


def input_path(text: str) -> Path:
    """A path of the command line. pathlib drops the ./ of ./ORG/NAME, which tells it from an id."""
    path = Path(text)
    return path.absolute() if text.startswith("./") and not path.exists() else path


# --- what the commands open ---------------------------------------------------------------------


def fetch_language_model(name: str, path: Path, tokenizer_files: Collection[str]) -> Path:
    """`path`, or what it is a hub id of, downloaded: a directory as transformers writes it, or a file.

    name: what messages call the path. tokenizer_files: names of files to fetch beside the weights.
    UserError: as `_fetch`.
    """
    return _fetch_if_id(name, path, functools.partial(select_language_model, tokenizer_files))


def fetch_tokenizer(name: str, path: Path, tokenizer_files: Collection[str]) -> Path:
    """`path`, or the tokenizer of the model that it is a hub id of, downloaded: a directory."""
    return _fetch_if_id(name, path, functools.partial(select_tokenizer, tokenizer_files))


def fetch_checkpoint(name: str, path: Path, tokenizer_files: Collection[str] = ()) -> Path:
    """`path`, or what it is a hub id of, downloaded: a weight file, or a model directory; with
    tokenizer_files also a directory as transformers writes it."""
    select = functools.partial(select_whole_model, tokenizer_files)
    return _fetch_if_id(name, path, select if tokenizer_files else select_model_directory)


def fetch_model_directory(path: Path | str) -> Path | str:
    """`path`, or the model directory that it is a hub id of, downloaded."""
    hub_id = parse_hub_id(path)
    return path if hub_id is None else _model_directory(hub_id)


@functools.cache  # one process uses one commit of a branch
def _model_directory(hub_id: HubId) -> Path:
    if hub_id.file or hub_id.tag:
        raise UserError(
            f"model directory {hub_id} is a file: expected ORG/NAME or ORG/NAME@REVISION"
        )
    return _fetch("model directory", hub_id, select_model_directory)


def _fetch_if_id(name: str, path: Path, select: Select) -> Path:
    hub_id = parse_hub_id(path)
    if hub_id is None:
        return path
    if hub_id.file:
        select = functools.partial(select_file, hub_id.file)
    elif hub_id.tag:
        select = functools.partial(select_gguf, hub_id.tag)
    return _fetch(name, hub_id, select)


# --- where a file came from ---------------------------------------------------------------------


def is_uri(text: str) -> bool:
    """Whether text is written hf://..., as model.json has the ids of bases."""
    return _URI.fullmatch(text) is not None


def source_uri(path: Path | str) -> str | None:
    """hf://ORG/NAME@COMMIT of a path in the hub's cache, with /FILE if it is one; None for another path."""
    parts = Path(path).parts
    for at, (repo, snapshots) in enumerate(itertools.pairwise(parts)):
        if repo.startswith("models--") and snapshots == "snapshots" and len(parts) > at + 2:
            repo_id = repo.removeprefix("models--").replace("--", "/", 1)
            return "/".join([f"hf://{repo_id}@{parts[at + 2]}", *parts[at + 3 :]])
    return None


def source_record(paths: Iterable[Path | str]) -> dict[str, str]:
    """{"hub": URI} for `sources` in model.json: of one file or directory, or of the repositories that
    several files came from (joined by " + "). {} if they are not from the hub."""
    uris = [uri for path in paths if (uri := source_uri(path))]
    if len(uris) > 1:
        uris = list(dict.fromkeys("/".join(uri.split("/")[:4]) for uri in uris))
    return {"hub": " + ".join(uris)} if uris else {}


# --- download -----------------------------------------------------------------------------------


def _fetch(name: str, hub_id: HubId, select: Select) -> Path:
    """Download the selected files, of which those in the cache are used. Without network, or if the
    server does not answer for this repository, the cache alone is used, with a warning.

    UserError: not found, gated, no such revision, neither reachable nor cached, disk full, or the
    repository does not have what is needed.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError

    repo, revision = hub_id.repo, hub_id.revision

    def download(file: str) -> Path:
        return Path(hf_hub_download(repo, file, revision=revision))

    with _wrap_errors(name, hub_id):
        try:
            # without a timeout, a network that drops packets is waited for forever
            timeout = constants.HF_HUB_ETAG_TIMEOUT
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
        except RevisionNotFoundError:
            raise
        except Exception as e:
            if not _from_libraries(e):
                raise
            path = _fetch_cached(hub_id, select, e)
            if not isinstance(e, OfflineModeIsEnabled):  # which the user has asked for
                why = f"{type(e).__name__}: {one_line(e, 100)}"
                _log.warning(
                    "%s %s: %s cannot be asked (%s); using %s of the cache, which may be out of date",
                    name, hub_id, constants.ENDPOINT, why, source_uri(path) or path,
                )  # fmt: skip
            return path
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        selection = select(Listing(hub_id.repository, sizes.keys(), download))
        _check_space(name, hub_id, info.sha, selection, sizes)
        directory = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(selection.patterns),
            ignore_patterns=list(selection.ignored),
        )
        return Path(directory) / selection.path


def _fetch_cached(hub_id: HubId, select: Select, cause: Exception) -> Path:
    """The files selected of those in the cache; raises `cause` if it has no such revision.
    huggingface_hub.errors.IncompleteSnapshotError: some of the needed files are not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    def cached(patterns: list[str], ignored: list[str]) -> Path:
        return Path(
            snapshot_download(
                hub_id.repo,
                revision=hub_id.revision,
                local_files_only=True,
                allow_patterns=patterns,
                ignore_patterns=ignored,
            )
        )

    try:
        directory = cached([], [])
        files = [p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()]
        selection = select(Listing(hub_id.repository, files, lambda file: directory / file))
        return cached(list(selection.patterns), list(selection.ignored)) / selection.path
    except IncompleteSnapshotError:
        raise
    except LocalEntryNotFoundError:
        raise cause from None
    except UserError as e:
        reason = one_line(cause, 100)
        raise UserError(f"{e} (in the cache: the hub cannot be reached, {reason})") from e


def _check_space(
    name: str, hub_id: HubId, commit: str | None, selection: Selection, sizes: dict[str, int]
) -> None:
    """UserError: the disk has no room for the files that are not in the cache yet."""
    from huggingface_hub import constants, try_to_load_from_cache

    needed = sum(
        size
        for file, size in sizes.items()
        if selection.matches(file)
        and not isinstance(try_to_load_from_cache(hub_id.repo, file, revision=commit), str)
    )
    cache = Path(constants.HF_HUB_CACHE)
    while not cache.exists() and cache != cache.parent:
        cache = cache.parent
    if needed > (free := shutil.disk_usage(cache).free):
        raise UserError(
            f"{name} {hub_id}: the disk is full: {cache} has {free / 1e9:.1f} GB free, the download needs "
            f"{needed / 1e9:.1f} GB; set HF_HOME to a directory on another disk"
        )


@contextlib.contextmanager
def _wrap_errors(name: str, hub_id: HubId) -> Iterator[None]:
    """Errors of huggingface_hub and of the libraries below it become UserErrors."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if not _from_libraries(e):
            raise
        raise UserError(f"{name} {hub_id}: {_explanation(e, hub_id)}") from e


def _from_libraries(error: Exception) -> bool:
    module = type(error).__module__.partition(".")[0]
    return module in _LIBRARIES or isinstance(error, OSError | RuntimeError)


def _explanation(error: Exception, hub_id: HubId) -> str:
    """What failed, and what to do about it."""
    from huggingface_hub import constants, errors, get_token

    endpoint, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    if type(error) is errors.LocalEntryNotFoundError and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why the file, which is not in the cache, was not downloaded
    code = getattr(error, "errno", None)
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError):
        return (
            f"access is restricted: accept the terms at {endpoint}/{hub_id.repo}, then set HF_TOKEN or run "
            "`hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{endpoint}/{hub_id.repo} has no revision {hub_id.revision or 'main'}"
    if status == 401 and get_token():  # also for public models, if the token is wrong
        return (
            f"there is no such path here, and {endpoint} refuses your token (HF_TOKEN or `hf auth login`): "
            "renew it, or remove it if the model is public"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return (
            f"there is no such path here and no such model on {endpoint} (for a private one set HF_TOKEN "
            "or run `hf auth login`)"
        )
    if isinstance(error, errors.IncompleteSnapshotError):
        return (
            f"the copy in the cache {cache} is incomplete, and {endpoint} cannot be reached: run it again "
            "with a network and without HF_HUB_OFFLINE"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"there is no such path here, it is not in the cache {cache}, and HF_HUB_OFFLINE forbids to "
            "download it"
        )
    if status is not None:
        return f"{endpoint} answered with an error: {one_line(error)}"
    if code in _DISK_FULL or "no space left" in str(error).lower():
        return (
            f"the disk is full: make room in {cache}, or set HF_HOME to a directory on another disk"
        )
    if code is not None:
        return f"cannot write to the cache {cache} ({error}): set HF_HOME to another directory"
    return (
        f"there is no such path here, and it cannot be downloaded from {endpoint}: "
        f"{type(error).__name__}: {one_line(error)}; check the network, or give a local path"
    )
