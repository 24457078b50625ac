"""The training loop: batches in, steps, and periodically log lines, validation and checkpoints.

The device runs one step ahead of the host: a step is dispatched before the loss of the previous one is
read, so reading batches and writing logs cost no time.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from minigpt4_jax.errors import UserError
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.parallel.multihost import (
    AllReduceSum,
    all_gather_json,
    detect_lost_peer,
    is_main_process,
    is_multiprocess,
    raise_together,
)
from minigpt4_jax.parallel.sharding import shard_batch
from minigpt4_jax.storage.paths import StorageError, parse_path, wrap_storage_errors
from minigpt4_jax.training.benchmarks import Benchmarks, write_results
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.config_values import from_mapping
from minigpt4_jax.training.current_model import CurrentModel
from minigpt4_jax.training.evaluation import Validation
from minigpt4_jax.training.logs import (
    BENCHMARKS,
    EVAL_PREFIX,
    METRICS,
    SAMPLES,
    VAL_LOSS,
    import_tensorboard,
    read_metrics,
)
from minigpt4_jax.training.preemption import StopAgreement, handle_signals
from minigpt4_jax.training.progress import OnMetrics, TrainingProgress
from minigpt4_jax.training.run import Run, open_run
from minigpt4_jax.training.run_summary import summarize_run, summarize_sharding
from minigpt4_jax.training.setup import open_inputs
from minigpt4_jax.training.train_step import Metrics
from minigpt4_jax.training.workdir import (
    BEST,
    MODEL,
    check_is_shared,
    describe_saved_state,
    is_finished,
    keep_old_defaults,
    open_workdir,
    write_trained_model,
)
from minigpt4_jax.utils.compilation_cache import enable_compilation_cache
from minigpt4_jax.utils.malloc import keep_freed_memory


class TrainResult(NamedTuple):
    """What `train` returns."""

    model: Path  # model directory with the trained parts
    metrics: dict[str, float]  # of the last step, and the last val_loss if there is one
    steps: int


def train(
    config: TrainConfig | Any, workdir: str | Path, *, on_metrics: OnMetrics | None = None
) -> TrainResult:
    """Train a model; a run that was started in `workdir` before continues.

    config: a TrainConfig, an ml_collections.ConfigDict or a nested dict.
    workdir: holds everything the run writes; a local path or gs://bucket/....
    on_metrics: called with every record of metrics.jsonl.

    UserError: anything wrong with what was given, a loss that is not finite, a full disk.
    Stopped (a SystemExit): after SIGTERM (143) or Ctrl-C (130), once the state is saved.

    If jax.distributed is initialized, every process must make the same call, with a workdir that all of
    them share. If one is lost, the others raise PeerLostError or are aborted by JAX.
    """
    c = from_mapping(config.to_dict() if hasattr(config, "to_dict") else config)
    directory = parse_path("workdir", workdir)
    with (
        handle_signals() as stop_signal,
        _report_storage_errors(directory),
        ExitStack() as exit_stack,
        detect_lost_peer(partial(describe_saved_state, directory), exit_stack),
    ):
        stop_signal.deferred = is_multiprocess()  # processes stop together, between steps
        _prepare_process()
        c = keep_old_defaults(directory, c)
        with raise_together():
            inputs = open_inputs(c, exit_stack)
        with raise_together():
            if is_main_process():
                for message in open_workdir(directory, c):
                    print(message, flush=True)
        with raise_together():
            check_is_shared(directory)
        with raise_together():
            finished = is_main_process() and is_finished(directory, c)
        if all_gather_json(finished)[0]:
            if is_main_process():
                print(f"{directory} is done: its model is in {directory / MODEL}", flush=True)
            return _read_result(directory, c)
        run = open_run(c, directory, inputs, exit_stack)
        return Trainer(run, StopAgreement(stop_signal), on_metrics).train()


@contextmanager
def _report_storage_errors(workdir: Path) -> Iterator[None]:
    """UserError if a bucket cannot be reached and nothing in the body has reported it."""
    try:
        with wrap_storage_errors(workdir):
            yield
    except StorageError as e:
        raise UserError(f"cannot reach {workdir}: {e}; {describe_saved_state(workdir)}") from e


def _prepare_process() -> None:
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    enable_compilation_cache()
    if is_main_process():
        import_tensorboard()


def _read_result(workdir: Path, c: TrainConfig) -> TrainResult:
    metrics: dict[str, float] = {}
    for record in read_metrics(workdir):
        metrics |= record
    return TrainResult(workdir / MODEL, metrics, c.steps)


class _PendingStep(NamedTuple):
    """A dispatched step whose results have not been read."""

    step: int
    metrics: Metrics
    # int32 [3] over processes: with a stop signal; rows read and skipped so far
    sums: jax.Array | np.ndarray


class Trainer:
    """Trains an open run to its end."""

    def __init__(self, run: Run, stop: StopAgreement, on_metrics: OnMetrics | None):
        inputs = run.inputs
        self.run, self.stop, self.loader = run, stop, inputs.loader
        parts = inputs.model_config, inputs.tokenizer, inputs.mesh, run.program.split
        self.model = CurrentModel(*parts)
        self.validation: Validation | None = None
        if inputs.validation_examples:
            self.validation = Validation(run.c, *parts, inputs.validation_examples, self.model)
        self.benchmarks = Benchmarks(run.c.eval, inputs.eval_tasks) if inputs.eval_tasks else None
        self.sum_over_processes = AllReduceSum(inputs.mesh)
        self.progress = TrainingProgress(run.c, run.log, run.count_skipped, on_metrics)
        self.pending_steps: list[_PendingStep] = []

    def train(self) -> TrainResult:
        run = self.run
        self._log_start()
        self.stop.signal.deferred = True
        self._run_pending_evaluations()
        self.stop.check()  # for a signal during startup
        while run.step < run.c.steps:
            if self.stop.agreed:
                self._save_and_stop()
            self._dispatch_step()
            if self._is_periodic_work_due():
                self._read_results()
                self._do_periodic_work()
            else:
                self._read_results(keep_pending=1)
        return self._finish()

    def _log_start(self) -> None:
        run, inputs = self.run, self.run.inputs
        frozen = run.program.split.frozen
        run.log.write_line(summarize_run(run.c, run.step, run.trainable, frozen, run.workdir))
        if inputs.mesh.size > 1:
            run.log.write_line(
                summarize_sharding(
                    inputs.mesh, inputs.mesh_reason, run.trainable, frozen, run.opt_state
                )
            )

    # --- steps ------------------------------------------------------------------------------

    def _dispatch_step(self) -> None:
        run, loader, program = self.run, self.loader, self.run.program
        batch = shard_batch(
            self._next_batch(), run.inputs.mesh, (loader.num_rows, loader.num_local_rows)
        )
        learning_rate = np.float32(program.learning_rate(run.step))
        run.trainable, run.opt_state, metrics = program.step(
            run.trainable, run.opt_state, program.split.frozen, batch, learning_rate,
            np.int32(run.step),
        )  # fmt: skip
        run.step += 1
        sums = self.sum_over_processes(
            bool(self.stop.signal), loader.skip_counter.rows, loader.skip_counter.skipped
        )
        self.pending_steps.append(_PendingStep(run.step, metrics, sums))

    def _next_batch(self) -> Batch:
        """Wait for the next batch, or for a signal if there is one process: one of several must take
        the step that the others take."""
        single = not is_multiprocess()
        while not self.loader.ready(seconds=1.0) and not (single and self.stop.signal):
            pass
        if single and self.stop.signal:
            self._save_and_stop()
        try:
            return next(self.loader)
        except UserError as e:
            saved = self._save() if single else describe_saved_state(self.run.workdir)
            raise UserError(f"{e}; {saved}") from e

    def _read_results(self, keep_pending: int = 0) -> None:
        """Wait for the dispatched steps, except the last `keep_pending`, and report their results."""
        while len(self.pending_steps) > keep_pending:
            step, metrics, sums = self.pending_steps.pop(0)
            signalled, rows, skipped = np.asarray(sums).tolist()
            self.stop.note(signalled)
            loss, grad_norm, tokens = (float(m) for m in metrics[:3])
            self._check_finite(step, loss, grad_norm)
            learning_rate = self.run.program.learning_rate(step - 1)
            record = {
                "step": step, "loss": loss, "lr": learning_rate, "grad_norm": grad_norm,
                "tokens": int(tokens),
            }  # fmt: skip
            record |= {name: float(term) for name, term in metrics.terms.items()}
            if skipped:
                record["skipped"] = skipped
            self.progress.report_step(record, rows)

    def _check_finite(self, step: int, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        self.run.checkpoints.wait()
        self.run.log.flush()
        what = f"gradient norm {grad_norm}" if math.isfinite(loss) else f"loss {loss}"
        raise UserError(
            f"step {step}: {what} is not finite; {describe_saved_state(self.run.workdir)}. Lower "
            "init_lr, set clip, or check the data, in another --workdir"
        )

    # --- periodic work ----------------------------------------------------------------------

    def _is_periodic_work_due(self) -> bool:
        """Whether this step's results are needed at once, for validation, samples or a checkpoint."""
        c = self.run.c
        periods = (c.save_every, c.eval_every, c.sample_every, c.eval.every)
        return any(map(self._is_due, periods)) or self._is_last

    def _is_due(self, period: int) -> bool:
        return period > 0 and self.run.step % period == 0

    @property
    def _is_last(self) -> bool:
        return self.run.step == self.run.c.steps

    def _do_periodic_work(self) -> None:
        """Validation, samples, benchmarks and a checkpoint, as far as they are due. All are due after the
        last step."""
        run, c, start = self.run, self.run.c, time.perf_counter()
        periods = {VAL_LOSS: c.eval_every, SAMPLES: c.sample_every}
        run.pending_evaluations = [
            name
            for name, period in periods.items()
            if period and (self._is_last or self._is_due(period))
        ]
        if self.benchmarks and (self._is_last or self._is_due(c.eval.every)):
            run.pending_evaluations.append(BENCHMARKS)
        self._run_pending_evaluations()
        if self._is_last or self._is_due(c.save_every):
            run.save_checkpoint()
        self.progress.exclude(time.perf_counter() - start)

    def _run_pending_evaluations(self) -> None:
        """Validation loss, samples and benchmarks; those not done when the run is to stop stay pending."""
        run, validation = self.run, self.validation
        if validation is None:
            run.pending_evaluations = [n for n in run.pending_evaluations if n == BENCHMARKS]
        elif VAL_LOSS in run.pending_evaluations:
            loss = validation.loss(run.trainable, self.stop.check)
            if loss is None:
                return
            self.progress.write_metrics({"step": run.step, VAL_LOSS: loss})
            run.log.write_line(f"step {run.step}/{run.c.steps}  val_loss {loss:.4f}")
            run.pending_evaluations.remove(VAL_LOSS)
        if validation and SAMPLES in run.pending_evaluations and not self.stop.check():
            run.log.write_samples(run.step, validation.captions(run.trainable))
            run.pending_evaluations.remove(SAMPLES)
        if BENCHMARKS in run.pending_evaluations and self._run_benchmarks():
            run.pending_evaluations.remove(BENCHMARKS)

    def _run_benchmarks(self) -> bool:
        """Score the model of this step, and keep it if it is the best; False if the run is to stop."""
        run = self.run
        if self.benchmarks is None:  # the configuration has none any more
            return True
        model = self.model.with_parameters(run.trainable)
        scores = self.benchmarks.scores(model, self.stop.check)
        if scores is None:
            return False
        with raise_together():
            if is_main_process():
                self._keep_if_best(scores)
                write_results(run.log.directory, run.step, scores)
        values = {EVAL_PREFIX + name: float(of_task["score"]) for name, of_task in scores.items()}
        self.progress.write_metrics({"step": run.step, **values})
        shown = "  ".join(f"{name} {value:.2f}" for name, value in values.items())
        run.log.write_line(f"step {run.step}/{run.c.steps}  {shown}")
        return True

    def _keep_if_best(self, scores: dict[str, dict[str, Any]]) -> None:
        run, benchmarks = self.run, self.benchmarks
        run.log.flush()
        if benchmarks is None or not benchmarks.is_best(scores, read_metrics(run.log.directory)):
            return
        name = run.c.eval.best
        result = {"steps": run.step, name: scores[name]["score"], "seed": run.c.seed}
        path = write_trained_model(
            run.workdir / BEST, run.c, run.inputs.model_config, run.trainable, result
        )
        run.log.write_line(f"best {name} so far: the model is in {path}")

    # --- the end ----------------------------------------------------------------------------

    def _save(self) -> str:
        """Save the current state, unless it is saved; returns a description of it."""
        run = self.run
        self._read_results()
        if run.step and run.checkpoints.latest_step != run.step:
            run.save_checkpoint()
        run.checkpoints.wait()
        return f"step {run.step} is saved" if run.step else "no step was done yet"

    def _save_and_stop(self) -> None:
        saved = self._save()
        self.run.log.write_line(
            f"stopped by {self.stop.signal.name}; {saved}: start the same command again to continue"
        )
        sys.stdout.flush()
        raise self.stop.signal.exception()

    def _finish(self) -> TrainResult:
        run = self.run
        run.checkpoints.wait()
        run.log.flush()
        if self.stop.check():
            self._save_and_stop()
        result = _read_result(run.workdir, run.c)
        loss = result.metrics["loss"]
        with raise_together():
            if is_main_process():
                self._write_results(loss)
        run.log.write_line(
            f"done: {run.step} steps, loss {loss:.4f}; the model is in {result.model}"
        )
        return result

    def _write_results(self, loss: float) -> None:
        from minigpt4_jax.visualization.plots import loss_plot  # imports matplotlib

        run = self.run
        loss_plot(run.log.directory / METRICS, run.log.directory / "loss.png")
        run.log.flush()
        write_trained_model(  # last: its presence marks the run as finished
            run.workdir / MODEL, run.c, run.inputs.model_config, run.trainable,
            {"steps": run.step, "loss": loss, "seed": run.c.seed},
        )  # fmt: skip
