"""What a run shows of itself: lines, metrics.jsonl, samples.jsonl, TensorBoard, a progress bar."""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any

from minigpt4_jax.storage.atomic import write_error, write_text_atomically
from minigpt4_jax.storage.paths import SyncedDirectory

METRICS, SAMPLES, TENSORBOARD = "metrics.jsonl", "samples.jsonl", "tensorboard"
VAL_LOSS = "val_loss"


def import_tensorboard() -> None:
    """Begin importing tensorboardX beside other work: it imports PyTorch where that is installed,
    which takes seconds."""

    def load() -> None:
        import tensorboardX  # noqa: F401

    threading.Thread(target=load, daemon=True).start()


class RunLog:
    """The log of the run in `workdir`, continued behind `step`: what an interrupted run recorded
    after it is taken out first, and will be recorded again. owed: what will be recorded again of
    the step itself, VAL_LOSS or SAMPLES."""

    def __init__(self, workdir: Path, step: int, steps: int, owed: Collection[str] = ()):
        self._workdir, self._step = workdir, step
        self._directory = SyncedDirectory(workdir)
        self.here = self._directory.local  # the folder that the files grow in
        self._writer: Any = None
        self._files: dict[str, IO[str]] = {}
        for name in (METRICS, SAMPLES):
            self._guard(lambda name=name: self._open(name, step, owed))
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)

    def _open(self, name: str, step: int, owed: Collection[str]) -> None:
        def is_kept(record: dict[str, Any]) -> bool:
            again = name in owed or (VAL_LOSS in record and VAL_LOSS in owed)
            return record["step"] < step + (not again)

        self._directory.download(name)
        path = self.here / name
        _truncate(path, is_kept)
        self._files[name] = path.open("a", encoding="utf-8")

    def line(self, text: str) -> None:
        """One line for people, above the progress bar where there is one."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def advance(self, step: int, loss: float) -> None:
        """Move the progress bar to `step`."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update(step - self._bar.n)

    def metrics(self, record: dict[str, Any]) -> None:
        """Append {"step": ..., name: number} to metrics.jsonl and TensorBoard."""
        self._append(METRICS, record)
        values = [{"tag": k, "simple_value": v} for k, v in record.items() if k != "step"]
        self._event(record["step"], values)

    def sample(self, record: dict[str, Any]) -> None:
        """Append {"step", "image", "text"} to samples.jsonl and TensorBoard, and print it."""
        self._append(SAMPLES, record)
        name = Path(record["image"]).name
        self._event_text(record["step"], f"samples/{name}", record["text"])
        self.line(f"  {name}: {' '.join(record['text'].split())}")

    def flush(self) -> None:
        """Bring everything to disk, or to the bucket: a checkpoint is only as good as the log up to it."""
        for file in self._files.values():
            self._guard(file.flush)
            self._guard(lambda file=file: os.fsync(file.fileno()))
        if self._writer is not None:
            self._guard(self._writer.flush)
        if self._files:
            self._guard(self._directory.upload_changes)

    def close(self) -> None:
        """Never raises: what matters was flushed before, and another error may be on its way."""
        if self._bar is not None:
            self._bar.close()
        for file in [*self._files.values(), *filter(None, [self._writer])]:
            with contextlib.suppress(OSError):
                file.close()
        if self._files:
            self._directory.close()

    def _append(self, name: str, record: dict[str, Any]) -> None:
        self._guard(lambda: self._files[name].write(json.dumps(record, ensure_ascii=False) + "\n"))

    def _event(self, step: int, values: list[Any]) -> None:
        from tensorboardX.proto import summary_pb2

        made = [v if not isinstance(v, dict) else summary_pb2.Summary.Value(**v) for v in values]
        event = {"step": step, "summary": summary_pb2.Summary(value=made)}
        self._guard(lambda: self._tensorboard()(event))

    def _event_text(self, step: int, tag: str, text: str) -> None:
        from tensorboardX.summary import text as text_summary

        self._event(step, list(text_summary(tag, text).value))

    def _tensorboard(self) -> Any:
        """Writes one event. Not tensorboardX's SummaryWriter: its thread dies on a full disk, and
        then its queue blocks for ever."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        def write(fields: dict[str, Any]) -> None:
            self._writer.write_event(event_pb2.Event(wall_time=time.time(), **fields))

        if self._writer is None:
            folder = self.here / TENSORBOARD
            folder.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
            if self._step:  # what an interrupted run had written behind the checkpoint is void
                start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                write({"step": self._step + 1, "session_log": start})
        return write

    def _guard(self, write: Any) -> None:
        try:
            write()
        except OSError as e:
            raise write_error(self._workdir, e) from e


class NoLog(RunLog):
    """The log of a process that shows nothing, since another does."""

    def __init__(self) -> None:
        self._bar, self._files, self._writer = None, {}, None

    def line(self, text: str) -> None:
        pass

    def metrics(self, record: dict[str, Any]) -> None:
        pass

    def sample(self, record: dict[str, Any]) -> None:
        pass


def _truncate(path: Path, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    """Keep these of the whole records; a torn last line of a killed run goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if is_kept(json.loads(line)):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_text_atomically(path, "".join(line + "\n" for line in kept))


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, in order."""
    path = workdir / METRICS
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def duration(seconds: float) -> str:
    """3725 -> '1h02m', 65 -> '1m05s', 7 -> '7s'."""
    whole = round(seconds)
    minutes, hours = whole // 60, whole // 3600
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"
