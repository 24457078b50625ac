"""Reports each step of a run: metrics, and every `log_every` steps a line with speed and time left."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from minigpt4_jax.data.skipped import SkipCounter
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.logs import RunLog, format_duration

OnMetrics = Callable[[dict[str, float]], None]


class _Mark(NamedTuple):
    """A point in time that speed is measured from."""

    time: float  # time.perf_counter
    step: int
    rows: int


class TrainingProgress:
    """Writes results of steps to the log.

    count_skipped: the skipped rows of all processes; called when a step reports more of them than
    before. on_metrics: called with every record of metrics.jsonl.
    """

    def __init__(
        self,
        c: TrainConfig,
        log: RunLog,
        count_skipped: Callable[[], SkipCounter],
        on_metrics: OnMetrics | None,
    ):
        self._c, self._log, self._on_metrics = c, log, on_metrics
        self._count_skipped = count_skipped
        self._reported_skipped = count_skipped().skipped
        self._mark: _Mark | None = None

    def report_step(self, record: dict[str, Any], rows: int) -> None:
        """Log the metrics of a step. rows: that were read up to this step."""
        step, loss = record["step"], record["loss"]
        self._log.update_progress(step, loss)
        if step % self._c.log_every == 0 or step == self._c.steps:
            speed = self._log_line(record, rows)
            record |= speed
            if record.get("skipped", 0) > self._reported_skipped:
                self._reported_skipped = record["skipped"]
                self._log.write_line(str(self._count_skipped()))
        elif self._mark is None:
            self._mark = _Mark(time.perf_counter(), step, rows)
        self.write_metrics(record)

    def write_metrics(self, record: dict[str, Any]) -> None:
        self._log.write_metrics(record)
        if self._on_metrics is not None:
            self._on_metrics(record)

    def exclude(self, seconds: float) -> None:
        """Exclude time that was not spent on training from the measured speed."""
        if self._mark is not None:
            self._mark = self._mark._replace(time=self._mark.time + seconds)

    def _log_line(self, record: dict[str, Any], rows: int) -> dict[str, float]:
        """Write the line of a step. Returns the speed since the last line; nothing for the first line,
        whose step compiled the program."""
        step, steps = record["step"], self._c.steps
        line = f"step {step}/{steps}  loss {record['loss']:.4f}  lr {record['lr']:.3g}"
        speed: dict[str, float] = {}
        last, self._mark = self._mark, _Mark(time.perf_counter(), step, rows)
        if last is not None:
            seconds = self._mark.time - last.time
            examples_per_second = (rows - last.rows) / seconds
            seconds_left = (steps - step) * seconds / (step - last.step)
            line += f"  {examples_per_second:.3g} examples/s  {format_duration(seconds_left)} left"
            speed = {"examples_per_second": examples_per_second}
        self._log.write_line(line)
        return speed
