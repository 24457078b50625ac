"""The loop: batches in, steps, and at their periods log lines, validation, samples and checkpoints.

The device runs one step ahead of the host: a step is dispatched before the loss of the one before
is read, so that reading batches and writing logs cost nothing.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.checkpoint.loader import check_trainable, open_tensors
from minigpt4_jax.data.json_records import Example
from minigpt4_jax.data.skipped import SkipCounter
from minigpt4_jax.errors import UserError
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.parallel.multihost import (
    AllReduceSum,
    all_gather_json,
    any_process,
    detect_lost_peer,
    is_main_process,
    is_multiprocess,
    raise_together,
)
from minigpt4_jax.parallel.sharding import replicate, shard_batch
from minigpt4_jax.processing.tokenizer import load_tokenizer
from minigpt4_jax.storage.paths import StorageError, parse_path, wrap_storage_errors
from minigpt4_jax.training.checkpoints import Checkpoints
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.config_values import from_mapping
from minigpt4_jax.training.evaluation import Validation, read_validation
from minigpt4_jax.training.logs import (
    METRICS,
    SAMPLES,
    VAL_LOSS,
    NoLog,
    RunLog,
    import_tensorboard,
    read_metrics,
)
from minigpt4_jax.training.mesh_selection import choose_mesh, describe_run
from minigpt4_jax.training.preemption import Stop, listen
from minigpt4_jax.training.progress import Progress
from minigpt4_jax.training.setup import build, open_loader
from minigpt4_jax.training.train_step import Metrics, trained_parts
from minigpt4_jax.training.workdir import (
    CHECKPOINTS,
    MODEL,
    check_shared,
    describe_saved_state,
    is_done,
    model_config,
    open_workdir,
    write_trained,
)
from minigpt4_jax.utils.compilation_cache import enable_compilation_cache
from minigpt4_jax.utils.malloc import keep_freed_memory


class TrainResult(NamedTuple):
    """What `train` leaves."""

    model: Path  # model directory with the trained parts
    metrics: dict[str, float]  # of the last step, and the last val_loss where there is one
    steps: int


def train(
    config: TrainConfig | Any,
    workdir: str | Path,
    *,
    on_metrics: Callable[[dict[str, float]], None] | None = None,
) -> TrainResult:
    """Train as `config` (TrainConfig, ConfigDict or nested dict) says, keeping everything in
    `workdir`; continue there if it was begun before.

    on_metrics: called with every record of metrics.jsonl. UserError: anything wrong with what was
    given, a loss that is not finite, a disk that is full. Stopped, a SystemExit, after SIGTERM
    (143) or Ctrl-C (130), once the state is saved.
    Where jax.distributed is initialized, every process calls this alike, with one workdir that all
    of them see; if one is gone, the others raise PeerLostError, or are aborted by JAX.
    """
    c = from_mapping(config.to_dict() if hasattr(config, "to_dict") else config)
    folder = parse_path("workdir", workdir)
    with listen() as stop, _reached(folder), ExitStack() as closing:
        stop.running = is_multiprocess()  # then all stop together, at a step
        with detect_lost_peer(partial(describe_saved_state, folder), closing):
            return _Loop(c, folder, stop, on_metrics, closing).run()


@contextmanager
def _reached(workdir: Path) -> Iterator[None]:
    """UserError where a bucket could not be reached, and nothing in the body has said so."""
    try:
        with wrap_storage_errors(workdir):
            yield
    except StorageError as e:
        raise UserError(f"cannot reach {workdir}: {e}; {describe_saved_state(workdir)}") from e


class _Dispatched(NamedTuple):
    """A step on its way, and what the processes told with it."""

    step: int
    metrics: Metrics
    sums: Any  # int32 [3]: processes that are told to stop; rows read, and left out, so far


class _Loop:
    """One run from start to end. `step` counts updates that were dispatched."""

    def __init__(
        self,
        c: TrainConfig,
        workdir: Path,
        stop: Stop,
        on_metrics: Callable[[dict[str, float]], None] | None,
        closing: ExitStack,
    ):
        if jax.default_backend() == "cpu":
            keep_freed_memory()
        enable_compilation_cache()
        if is_main_process():
            import_tensorboard()
        self.c, self.workdir, self.stop = c, workdir, stop
        self.on_metrics, self.closing = on_metrics, closing
        with raise_together():
            held_out = self._look_at_everything()
        with raise_together():  # what is written once
            if is_main_process():
                open_workdir(workdir, c)
        with raise_together():
            check_shared(workdir)
        self.done = all_gather_json(is_done(workdir, c))[0]
        if self.done:
            return
        self.checkpoints = Checkpoints(workdir / CHECKPOINTS, c.keep)
        closing.callback(self.checkpoints.close)
        with raise_together():
            built = build(c, self.model_config, self.parts, self.mesh)
        self.split, self.trainable, self.opt_state, self.rate, self.update = built
        del built
        self._restore()
        self.validation = None
        if held_out:
            self.validation = Validation(c, self.model_config, self.tokenizer, self.split, held_out)

    def _look_at_everything(self) -> list[Example]:
        """Of what the user gave, before anything is written; of the weights the heads. -> the
        held-out rows."""
        c = self.c
        self.model_config = model_config(c)
        self.tokenizer = load_tokenizer(
            model_directory.tokenizer_dir(c.model), self.model_config.tokenizer.kind
        )
        self.parts = trained_parts(freeze_vit=c.freeze_vit, freeze_qformer=c.freeze_qformer)
        self.mesh, self.why = choose_mesh(c, self.model_config)
        self.sums = AllReduceSum(self.mesh)
        self.loader = open_loader(c, self.model_config, self.tokenizer, self.mesh)
        self.closing.callback(self.loader.close)
        held_out = read_validation(c)
        check_trainable(c.model, self.model_config, self.parts)
        open_tensors(c.model, self.model_config)
        return held_out

    def _restore(self) -> None:
        found = self.checkpoints.restore(self.trainable, self.opt_state)
        self.step = 0
        if found is not None:
            self.step = found.step
            self.trainable, self.opt_state = replicate(
                (found.trainable, found.opt_state), self.mesh
            )
            loader = found.extra["loader"]
            with raise_together():  # all counts are the first process's, for their sum to be right
                self.loader.restore(loader if is_main_process() else loader | {"tally": {}})
        # Of this step's validation and samples, what a stop left undone.
        self.owed: list[str] = found.extra["owed"] if found else []
        with raise_together():
            log = (self.workdir, self.step, self.c.steps, self.owed)
            self.log = RunLog(*log) if is_main_process() else NoLog()
        self.closing.callback(self.log.close)
        for line in found.damaged if found else ():
            self.log.line(line)
        self.pending: list[_Dispatched] = []
        self.told = False  # that the run is to stop, as all processes know
        self.progress = Progress(self.c, self.log, self._tally, self.on_metrics)

    # --- running --------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        if self.done:
            if is_main_process():
                print(
                    f"{self.workdir} is done: its model is in {self.workdir / MODEL}",
                    flush=True,
                )
            return self._result()
        self._introduce()
        self.stop.running = True
        self._look()
        self._is_told()  # while it started, say
        while self.step < self.c.steps:
            if self.told:
                self._stop()
            self._dispatch()
            if self._is_time():
                self._at_period()
            else:
                self._drain(leave=1)
        return self._finish()

    def _introduce(self) -> None:
        c, (trained, total) = self.c, self._counts()
        begin = f"continuing at step {self.step}" if self.step else "starting"
        self.log.line(
            f"{begin}: {c.model}, {trained:,} of {total:,} parameters trained, {c.dtype}; "
            f"batch {c.batch_size}, {c.steps} steps; {self._devices()}; "
            f"log in {self.workdir}"
        )
        if self.mesh.size > 1:
            self.log.line(
                describe_run(self.mesh, self.why, self.split.frozen, self.trainable, self.opt_state)
            )

    def _devices(self) -> str:
        kind = f"device {jax.devices()[0].device_kind}"
        return f"{kind}, {jax.process_count()} processes" if is_multiprocess() else kind

    def _counts(self) -> tuple[int, int]:
        trained = sum(a.size for a in self.trainable.values())
        return trained, trained + sum(a.size for a in self.split.frozen)

    def _next_batch(self) -> Batch:
        """Waits for it, unless the run is told to stop meanwhile: of several processes, each must
        take the step that the others take."""
        alone = not is_multiprocess()
        while not self.loader.ready(seconds=1.0) and not (alone and self.stop):
            pass
        if alone and self.stop:
            self._stop()
        try:
            return next(self.loader)
        except UserError as e:
            raise UserError(
                f"{e}; {self._keep() if alone else describe_saved_state(self.workdir)}"
            ) from e

    def _dispatch(self) -> None:
        batch = shard_batch(
            self._next_batch(), self.mesh, (self.loader.num_rows, self.loader.num_local_rows)
        )
        rate = np.float32(self.rate(self.step))
        self.trainable, self.opt_state, metrics = self.update(
            self.trainable, self.opt_state, self.split.frozen, batch, rate, np.int32(self.step)
        )
        self.step += 1
        tally = self.loader.skip_counter
        sums = self.sums(bool(self.stop), tally.rows, tally.skipped)
        self.pending.append(_Dispatched(self.step, metrics, sums))

    def _is_time(self) -> bool:
        """Whether something is due after this step that needs its result."""
        c = self.c
        periods = (c.save_every, c.eval_every, c.sample_every)
        return self.step == c.steps or any(map(self._due, periods))

    def _due(self, period: int) -> bool:
        return period > 0 and self.step % period == 0

    def _at_period(self) -> None:
        c = self.c
        self._drain()
        begun, last = time.perf_counter(), self.step == c.steps
        looks = ((VAL_LOSS, c.eval_every), (SAMPLES, c.sample_every))
        self.owed = [name for name, every in looks if every and (last or self._due(every))]
        self._look()
        if last or self._due(c.save_every):
            self._save()
        self.progress.leave_out(time.perf_counter() - begun)

    def _look(self) -> None:
        """Validation and samples that are owed at this step, until the run is told to stop."""
        held_out = self.validation
        if held_out is None:
            self.owed = []
            return
        if VAL_LOSS in self.owed:
            loss = held_out.loss(self.trainable, self._is_told)
            if loss is None:
                return
            self.progress.record({"step": self.step, VAL_LOSS: loss})
            self.log.line(f"step {self.step}/{self.c.steps}  val_loss {loss:.4f}")
            self.owed.remove(VAL_LOSS)
        if SAMPLES in self.owed and not self._is_told():
            for sample in held_out.captions(self.trainable):
                self.log.sample({"step": self.step, **sample})
            self.owed.remove(SAMPLES)

    def _drain(self, leave: int = 0) -> None:
        """Read the results of dispatched steps, all but the last `leave`."""
        while len(self.pending) > leave:
            step, metrics, sums = self.pending.pop(0)
            told, rows, skipped = np.asarray(sums).tolist()
            self.told |= is_multiprocess() and told > 0
            loss, norm, tokens = (float(m) for m in metrics)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._not_finite(step, loss, norm)
            record = {"step": step, "loss": loss, "lr": self.rate(step - 1), "grad_norm": norm}
            record["tokens"] = int(tokens)
            if skipped:
                record["skipped"] = skipped
            self.progress.step(record, rows)

    def _not_finite(self, step: int, loss: float, norm: float) -> None:
        self.checkpoints.wait()
        self.log.flush()
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
        raise UserError(
            f"step {step}: {what} is not finite; {describe_saved_state(self.workdir)}. Lower init_lr, "
            "set clip, or look at the data, in another --workdir"
        )

    def _save(self) -> None:
        self.checkpoints.wait()
        try:
            self.log.flush()
        except UserError as e:
            raise UserError(f"{e}; {self.checkpoints.kept}") from e
        position = self.loader.state() | {"tally": self._tally().state()}
        extra = {"loader": position, "owed": self.owed}
        self.checkpoints.save(self.step, self.trainable, self.opt_state, extra)

    def _keep(self) -> str:
        """Save where the run stands, unless that is saved, and say so."""
        self._drain()
        if self.step and self.checkpoints.latest != self.step:
            self._save()
        self.checkpoints.wait()
        return f"step {self.step} is saved" if self.step else "no step was done yet"

    def _tally(self) -> SkipCounter:
        """Of the rows of all processes; waits for these."""
        if not is_multiprocess():
            return self.loader.skip_counter
        return SkipCounter.total(all_gather_json(self.loader.skip_counter.report()))

    def _is_told(self) -> bool:
        """Whether the run is to stop: of several processes, whether one of them is told; then all
        must ask at the same place, and know it from there on."""
        if not is_multiprocess():
            return bool(self.stop)
        self.told = self.told or any_process(self.stop)
        return self.told

    def _stop(self) -> None:
        """Save where the run stands and leave."""
        kept = self._keep()
        self.log.line(
            f"stopped by {self.stop.name}; {kept}: start the same command again to continue"
        )
        sys.stdout.flush()
        raise self.stop.end()

    # --- the end --------------------------------------------------------------------------------

    def _finish(self) -> TrainResult:
        self.checkpoints.wait()
        self.log.flush()
        if self._is_told():
            self._stop()
        done = self._result()
        loss = done.metrics["loss"]
        with raise_together():
            if is_main_process():
                self._write(loss)
        self.log.line(f"done: {self.step} steps, loss {loss:.4f}; the model is in {done.model}")
        return done

    def _write(self, loss: float) -> None:
        from minigpt4_jax.visualization.plots import loss_plot  # matplotlib

        loss_plot(self.log.here / METRICS, self.log.here / "loss.png")
        self.log.flush()
        write_trained(  # the last thing to be written: a run that has it is done
            self.workdir, self.c, self.model_config, self.trainable,
            {"steps": self.step, "loss": loss, "seed": self.c.seed},
        )  # fmt: skip

    def _result(self) -> TrainResult:
        last: dict[str, float] = {}
        for record in read_metrics(self.workdir):
            last |= record
        return TrainResult(self.workdir / MODEL, last, self.c.steps)
