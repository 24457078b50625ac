"""The log of a run: lines, metrics.jsonl, samples with contact sheets, TensorBoard events, a progress bar."""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from PIL import Image

from minigpt4_jax.storage.atomic import write_error, write_text_atomically
from minigpt4_jax.storage.paths import SyncedDirectory

if TYPE_CHECKING:
    from minigpt4_jax.training.evaluation import Sample

METRICS, SAMPLES, TENSORBOARD = "metrics.jsonl", "samples.jsonl", "tensorboard"
SHEETS = "samples"  # directory of the contact sheets, STEP.png
VAL_LOSS = "val_loss"
BENCHMARKS, EVAL_PREFIX = "benchmarks", "eval/"  # scores in metrics.jsonl are eval/refcoco_val


def import_tensorboard() -> None:
    """Import tensorboardX in a background thread: it imports PyTorch if that is installed, which
    takes seconds."""

    def load() -> None:
        import tensorboardX  # noqa: F401

    threading.Thread(target=load, daemon=True).start()


class RunLog:
    """The log in `workdir` of a run that is at `step`.

    What an interrupted run recorded after that step is removed: it will be recorded again.
    pending: what will be recorded again of the step itself, VAL_LOSS, SAMPLES or BENCHMARKS.
    directory: local directory with the files.
    UserError from all methods but `close`: the working directory cannot be written.
    """

    def __init__(self, workdir: Path, step: int, steps: int, pending: Collection[str] = ()):
        self._workdir, self._step = workdir, step
        self._synced = SyncedDirectory(workdir)
        self.directory = self._synced.local
        self._event_writer: Any = None
        self._files: dict[str, IO[str]] = {}
        self._said_no_samples = False
        for name in (METRICS, SAMPLES):
            with self._report_write_errors():
                self._files[name] = self._open(name, step, pending)
        with self._report_write_errors():
            _remove_sheets(self.directory / SHEETS, step + (SAMPLES not in pending))
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)

    def _open(self, name: str, step: int, pending: Collection[str]) -> IO[str]:
        def is_final(record: dict[str, Any]) -> bool:
            again = name in pending or (VAL_LOSS in record and VAL_LOSS in pending)
            scores = any(key.startswith(EVAL_PREFIX) for key in record)
            again = again or (scores and BENCHMARKS in pending)
            return bool(record["step"] < step + (not again))

        self._synced.download(name)
        path = self.directory / name
        _filter_records(path, is_final)
        return path.open("a", encoding="utf-8")

    def write_line(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def update_progress(self, step: int, loss: float) -> None:
        """Move the progress bar to `step`."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update(step - self._bar.n)

    def write_metrics(self, record: dict[str, Any]) -> None:
        """Append {"step": ..., name: number} to metrics.jsonl and TensorBoard."""
        from tensorboardX.proto import summary_pb2

        self._append(METRICS, record)
        values = [
            summary_pb2.Summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
            if name != "step"
        ]
        self._write_event(record["step"], values)

    def write_samples(self, step: int, samples: Sequence["Sample"]) -> None:
        """Append {"step", "image", "prompt", "text"} of each sample to samples.jsonl, print it, and show
        all of them on a contact sheet, samples/STEP.png, and in TensorBoard. No samples are said once."""
        from tensorboardX.proto import summary_pb2
        from tensorboardX.summary import text as text_summary

        values: list[Any] = []
        for sample, name in zip(samples, _short_names(samples), strict=True):
            self._append(SAMPLES, {"step": step, **sample.record})
            values += text_summary(f"samples/{name}", sample.text).value
            self.write_line(f"  {name}: {' '.join(sample.text.split())}")
        if not samples:
            if not self._said_no_samples:
                self.write_line("  no samples: no row of the validation data has an image")
            self._said_no_samples = True
            return
        path = self._draw_sheet(step, samples)
        with self._report_write_errors(), Image.open(path) as sheet:
            width, height = sheet.size
            image = summary_pb2.Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes()
            )
        values.append(summary_pb2.Summary.Value(tag="samples", image=image))
        self._write_event(step, values)

    def _draw_sheet(self, step: int, samples: Sequence["Sample"]) -> Path:
        from minigpt4_jax.visualization.plots import contact_sheet

        return contact_sheet(
            [s.images for s in samples],
            [s.text for s in samples],
            [None] * len(samples),
            self.directory / SHEETS / f"{step}.png",
            title=f"Validation samples, step {step}",
        )

    def flush(self) -> None:
        """Write everything to disk, or to the bucket: a checkpoint is only as good as the log before
        it."""
        with self._report_write_errors():
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            if self._event_writer is not None:
                self._event_writer.flush()
            self._synced.upload_changes()

    def close(self) -> None:
        """Never raises: everything important was flushed before, and an error may be propagating."""
        if self._bar is not None:
            self._bar.close()
        for file in [*self._files.values(), *filter(None, [self._event_writer])]:
            with contextlib.suppress(OSError):
                file.close()
        self._synced.close()

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with self._report_write_errors():
            self._files[name].write(json.dumps(record, ensure_ascii=False) + "\n")

    def _write_event(self, step: int, values: list[Any]) -> None:
        """Write a TensorBoard event. Not with tensorboardX's SummaryWriter: its thread dies on a full
        disk, and then its queue blocks forever."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        def write(**fields: Any) -> None:
            self._event_writer.write_event(event_pb2.Event(wall_time=time.time(), **fields))

        with self._report_write_errors():
            if self._event_writer is None:
                directory = self.directory / TENSORBOARD
                directory.mkdir(exist_ok=True)
                # Names have the second: a run that goes on within it would overwrite the earlier events.
                suffix = f".{time.time_ns()}"
                self._event_writer = EventsWriter(str(directory / "events"), suffix)
                if self._step:  # tells TensorBoard to drop an interrupted run's later events
                    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                    write(step=self._step + 1, session_log=start)
            write(step=step, summary=summary_pb2.Summary(value=values))

    @contextlib.contextmanager
    def _report_write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise write_error(self._workdir, e) from e


class NullLog(RunLog):
    """The log of a process other than the main process: it writes nothing."""

    def __init__(self) -> None:
        pass

    def write_line(self, text: str) -> None:
        pass

    def update_progress(self, step: int, loss: float) -> None:
        pass

    def write_metrics(self, record: dict[str, Any]) -> None:
        pass

    def write_samples(self, step: int, samples: Sequence["Sample"]) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _short_names(samples: Sequence["Sample"]) -> list[str]:
    """Names for the log, all different: the names of the files, with as many of their folders as needed."""
    paths = [[Path(name).parts for name in sample.names] for sample in samples]
    longest = max((len(parts) for of_sample in paths for parts in of_sample), default=0)
    names: list[str] = []
    for kept in range(1, longest + 1):
        names = [" + ".join("/".join(p[-kept:]) for p in of_sample) for of_sample in paths]
        if len({*names}) == len(names):
            break
    return names


def _remove_sheets(directory: Path, first_step: int) -> None:
    """Remove the contact sheets of this step and later ones. Those in a bucket are overwritten."""
    for path in directory.glob("*.png"):
        if path.stem.isdigit() and int(path.stem) >= first_step:
            path.unlink()


def _filter_records(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Remove other records, and a last line that a killed run left incomplete."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            if keep(json.loads(line)):
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_text_atomically(path, "".join(lines))


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, in order."""
    path = workdir / METRICS
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def format_duration(seconds: float) -> str:
    """3725 -> '1h02m', 65 -> '1m05s', 7 -> '7s'."""
    seconds = round(seconds)
    minutes, hours = seconds // 60, seconds // 3600
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"
