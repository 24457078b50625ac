"""What the log says of each step: metrics, and at its periods a line with speed and time left."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from minigpt4_jax.data.skipped import SkipCounter
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.logs import NoLog, RunLog, duration


class _Speed(NamedTuple):
    text: str
    record: dict[str, float]


class Progress:
    """Reports the steps of a run as their results come.

    tally: rows left out so far, of all processes; asked when a step tells that there are more.
    on_metrics: called with every record of metrics.jsonl.
    """

    def __init__(
        self,
        c: TrainConfig,
        log: RunLog | NoLog,
        tally: Callable[[], SkipCounter],
        on_metrics: Callable[[dict[str, float]], None] | None,
    ):
        self._c, self._log, self._tally, self._on_metrics = c, log, tally, on_metrics
        self._clock: tuple[float, int, int] | None = None  # time, step, rows of the last log line
        self._skipped = tally().skipped  # rows, of which the log has told

    def step(self, record: dict[str, Any], rows: int) -> None:
        """Metrics of a step, after which so many rows had been read."""
        c, step, loss = self._c, record["step"], record["loss"]
        self._log.advance(step, loss)
        if step % c.log_every == 0 or step == c.steps:
            speed, rate = self._speed(step, rows), record["lr"]
            self._log.line(f"step {step}/{c.steps}  loss {loss:.4f}  lr {rate:.3g}" + speed.text)
            record |= speed.record
            if record.get("skipped", 0) > self._skipped:
                self._skipped = record["skipped"]
                self._log.line(str(self._tally()))
        elif self._clock is None:
            self._speed(step, rows)
        self.record(record)

    def record(self, record: dict[str, Any]) -> None:
        """Into metrics.jsonl."""
        self._log.metrics(record)
        if self._on_metrics is not None:
            self._on_metrics(record)

    def leave_out(self, seconds: float) -> None:
        """Do not count these to the time of steps: the rate is of training alone."""
        if self._clock is not None:
            self._clock = (self._clock[0] + seconds, *self._clock[1:])

    def _speed(self, step: int, rows: int) -> _Speed:
        """Since the last log line; nothing after the first step, which compiles the program."""
        now = time.perf_counter()
        last, self._clock = self._clock, (now, step, rows)
        if last is None:
            return _Speed("", {})
        each, rate = (now - last[0]) / (step - last[1]), (rows - last[2]) / (now - last[0])
        left = duration((self._c.steps - step) * each)
        return _Speed(f"  {rate:.3g} examples/s  {left} left", {"examples_per_second": rate})
