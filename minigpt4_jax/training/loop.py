"""The loop: batches in, steps, and at their periods log lines, validation, samples and checkpoints.

The device runs one step ahead of the host: a step is dispatched before the loss of the one before
is read, so that reading batches and writing logs cost nothing.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minigpt4_jax import optim, weights
from minigpt4_jax.compilation import enable_compilation_cache
from minigpt4_jax.data.batches import Arrays, Padding
from minigpt4_jax.data.loader import Loader, make_loader
from minigpt4_jax.data.packing import Packed, pack
from minigpt4_jax.data.sources import read_sources
from minigpt4_jax.errors import UserError
from minigpt4_jax.host_memory import keep_freed_memory
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.paths import local_path
from minigpt4_jax.sharding import put_rows, whole
from minigpt4_jax.tokenizer import load_tokenizer
from minigpt4_jax.training import run
from minigpt4_jax.training.checkpoints import Checkpoints
from minigpt4_jax.training.config import TrainConfig, from_mapping
from minigpt4_jax.training.datasets import open_parts
from minigpt4_jax.training.devices import choose_mesh, describe_run
from minigpt4_jax.training.logs import (
    METRICS,
    SAMPLES,
    VAL_LOSS,
    RunLog,
    duration,
    import_tensorboard,
    read_metrics,
)
from minigpt4_jax.training.step import Metrics, make_step, split_model, trained_parts
from minigpt4_jax.training.stopping import Stop, listen
from minigpt4_jax.training.validation import Validation, read_validation


class Result(NamedTuple):
    """What `train` leaves."""

    model: Path  # model directory with the trained parts
    metrics: dict[str, float]  # of the last step, and the last val_loss where there is one
    steps: int


def train(
    config: TrainConfig | Any,
    workdir: str | Path,
    *,
    on_metrics: Callable[[dict[str, float]], None] | None = None,
) -> Result:
    """Train as `config` (TrainConfig, ConfigDict or nested dict) says, keeping everything in
    `workdir`; continue there if it was begun before.

    on_metrics: called with every record of metrics.jsonl. UserError: anything wrong with what was
    given, a loss that is not finite, a disk that is full. Stopped, a SystemExit, after SIGTERM
    (143) or Ctrl-C (130), once the state is saved.
    """
    c = from_mapping(config.to_dict() if hasattr(config, "to_dict") else config)
    with listen() as stop, ExitStack() as closing:
        return _Loop(c, local_path("workdir", workdir), stop, on_metrics, closing).run()


class _Speed(NamedTuple):
    text: str
    record: dict[str, float]


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
        import_tensorboard()
        self.c, self.workdir, self.stop = c, workdir, stop
        self.on_metrics, self.closing = on_metrics, closing
        self.model_config = run.model_config(c)
        self.tokenizer = load_tokenizer(
            weights.tokenizer_dir(c.model), self.model_config.tokenizer.kind
        )
        self.parts = trained_parts(freeze_vit=c.freeze_vit, freeze_qformer=c.freeze_qformer)
        self.mesh, self.why = choose_mesh(c, self.model_config)
        # Everything the user gave is looked at before anything is written, of the weights the heads.
        self.loader = self._make_loader()
        self.closing.callback(self.loader.close)
        held_out = read_validation(c)
        weights.check_masters(c.model, self.model_config, self.parts)
        weights.check_tensors(c.model, self.model_config)
        run.open_workdir(workdir, c)
        self.done = run.is_done(workdir, c)
        if self.done:
            return
        self.checkpoints = Checkpoints(workdir / run.CHECKPOINTS, c.keep)
        closing.callback(self.checkpoints.close)
        self._build()
        self._restore()
        self.validation = None
        if held_out:
            self.validation = Validation(c, self.model_config, self.tokenizer, self.split, held_out)

    def _make_loader(self) -> Loader:
        c, d = self.c, self.c.data
        return make_loader(
            open_parts(d) if d.mix else read_sources(d.path, clean_captions=d.clean_captions),
            self.model_config, self.tokenizer,
            batch_size=c.batch_size, seed=c.seed, prompts=d.prompts, shuffle=d.shuffle, crop=d.crop,
            padding=Padding(d.pad_tokens, d.pad_answers), workers=d.workers, threads=d.threads,
            timeout=d.timeout, mix_by=d.mix_by, max_broken=d.max_broken, multiple=c.accumulate,
            pack=self._pack(),
        )  # fmt: skip

    def _pack(self) -> Callable[[Arrays], Packed] | None:
        c, d = self.c, self.c.data
        if d.pack_tokens == 0:
            return None
        return partial(
            pack, width=d.pack_tokens, visual_tokens=self.model_config.visual_tokens,
            pad_id=self.tokenizer.pad_id, micro_batches=c.accumulate,
            padding=Padding(d.pad_tokens, d.pad_answers),
        )  # fmt: skip

    def _build(self) -> None:
        """Weights onto the device, the optimizer and the programs."""
        c = self.c
        model, _ = weights.load_model(
            c.model, c.dtype, masters=self.parts, lora=self.model_config.lora, seed=c.seed,
            mesh=self.mesh,
        )  # fmt: skip
        self.split = split_model(model, self.parts, jnp.dtype(weights.DTYPES[c.dtype]))
        self.trainable = self.split.trainable
        self.split = self.split._replace(trainable={})  # donated by the first step
        tx = optim.adamw(
            self.split.decays, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay,
            clip=c.clip,
        )  # fmt: skip
        self.opt_state = jax.device_put(tx.init(self.trainable), whole(self.mesh))
        self.rate = optim.make_schedule(
            c.schedule, init_lr=c.init_lr, min_lr=c.min_lr, warmup_lr=c.warmup_lr,
            warmup_steps=c.warmup_steps, steps=c.steps, steps_per_epoch=c.steps_per_epoch,
            decay_rate=c.decay_rate,
        )  # fmt: skip
        dropout_in = self._dropout_in()
        self.update = make_step(
            self.split, tx, accumulate=c.accumulate, remat=c.remat,
            dropout_seed=c.seed if dropout_in else None, dropout_in=dropout_in,
        )  # fmt: skip

    def _dropout_in(self) -> set[str]:
        """The trained parts that have dropout."""
        q, lora = self.model_config.qformer, self.model_config.lora
        rates = {"qformer": q.dropout if q else 0.0, "lora": lora.dropout if lora else 0.0}
        return {part for part, rate in rates.items() if rate > 0 and part in self.parts}

    def _restore(self) -> None:
        found = self.checkpoints.restore(self.trainable, self.opt_state)
        self.step = 0
        if found is not None:
            self.step = found.step
            self.trainable = jax.device_put(found.trainable, whole(self.mesh))
            self.opt_state = jax.device_put(found.opt_state, whole(self.mesh))
            self.loader.restore(found.extra["loader"])
        # Of this step's validation and samples, what a stop left undone.
        self.owed: list[str] = found.extra["owed"] if found else []
        self.log = RunLog(self.workdir, self.step, self.c.steps, self.owed)
        self.closing.callback(self.log.close)
        for line in found.damaged if found else ():
            self.log.line(line)
        self.pending: list[tuple[int, Metrics, int, int]] = []  # and rows read and left out so far
        self.clock: tuple[float, int, int] | None = None  # time, step, rows of the last log line
        self.skipped = self.loader.tally.skipped  # rows, of which the log has told

    # --- running --------------------------------------------------------------------------------

    def run(self) -> Result:
        if self.done:
            print(f"{self.workdir} is done: its model is in {self.workdir / run.MODEL}", flush=True)
            return self._result()
        self._introduce()
        self.stop.running = True
        self._look()
        while self.step < self.c.steps:
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
            f"batch {c.batch_size}, {c.steps} steps; device {jax.devices()[0].device_kind}; "
            f"log in {self.workdir}"
        )
        if self.mesh.size > 1:
            self.log.line(
                describe_run(self.mesh, self.why, self.split.frozen, self.trainable, self.opt_state)
            )

    def _counts(self) -> tuple[int, int]:
        trained = sum(a.size for a in self.trainable.values())
        return trained, trained + sum(a.size for a in self.split.frozen)

    def _next_batch(self) -> Batch:
        """Waits for it, unless the run is told to stop meanwhile."""
        while not self.loader.ready(seconds=1.0) and not self.stop:
            pass
        if self.stop:
            self._stop()
        try:
            return next(self.loader)
        except UserError as e:
            raise UserError(f"{e}; {self._keep()}") from e

    def _dispatch(self) -> None:
        batch = put_rows(self._next_batch(), self.mesh)
        rate = np.float32(self.rate(self.step))
        self.trainable, self.opt_state, metrics = self.update(
            self.trainable, self.opt_state, self.split.frozen, batch, rate, np.int32(self.step)
        )
        self.step += 1
        tally = self.loader.tally
        self.pending.append((self.step, metrics, tally.rows, tally.skipped))

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
        if self.clock is not None:  # the rate is of training alone
            self.clock = (self.clock[0] + time.perf_counter() - begun, *self.clock[1:])

    def _look(self) -> None:
        """Validation and samples that are owed at this step, until the run is told to stop."""
        held_out = self.validation
        if held_out is None:
            self.owed = []
            return
        if VAL_LOSS in self.owed:
            loss = held_out.loss(self.trainable, self.stop)
            if loss is None:
                return
            self._record({"step": self.step, VAL_LOSS: loss})
            self.log.line(f"step {self.step}/{self.c.steps}  val_loss {loss:.4f}")
            self.owed.remove(VAL_LOSS)
        if SAMPLES in self.owed and not self.stop:
            for sample in held_out.captions(self.trainable):
                self.log.sample({"step": self.step, **sample})
            self.owed.remove(SAMPLES)

    def _drain(self, leave: int = 0) -> None:
        """Read the results of dispatched steps, all but the last `leave`."""
        while len(self.pending) > leave:
            step, metrics, rows, skipped = self.pending.pop(0)
            loss, norm, tokens = (float(m) for m in metrics)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._not_finite(step, loss, norm)
            record = {"step": step, "loss": loss, "lr": self.rate(step - 1), "grad_norm": norm}
            record["tokens"] = int(tokens)
            if skipped:
                record["skipped"] = skipped
            self._report(record, rows)

    def _report(self, record: dict[str, Any], rows: int) -> None:
        """Metrics of a step, after which so many rows had been read."""
        c, step, loss = self.c, record["step"], record["loss"]
        self.log.advance(step, loss)
        if step % c.log_every == 0 or step == c.steps:
            speed, rate = self._speed(step, rows), record["lr"]
            self.log.line(f"step {step}/{c.steps}  loss {loss:.4f}  lr {rate:.3g}" + speed.text)
            record |= speed.record
            if record.get("skipped", 0) > self.skipped:
                self.skipped = record["skipped"]
                self.log.line(str(self.loader.tally))
        elif self.clock is None:
            self._speed(step, rows)
        self._record(record)

    def _speed(self, step: int, rows: int) -> "_Speed":
        """Since the last log line; nothing after the first step, which compiles the program."""
        now, last, self.clock = time.perf_counter(), self.clock, (time.perf_counter(), step, rows)
        if last is None:
            return _Speed("", {})
        each, rate = (now - last[0]) / (step - last[1]), (rows - last[2]) / (now - last[0])
        left = duration((self.c.steps - step) * each)
        return _Speed(f"  {rate:.3g} examples/s  {left} left", {"examples_per_second": rate})

    def _record(self, record: dict[str, Any]) -> None:
        self.log.metrics(record)
        if self.on_metrics is not None:
            self.on_metrics(record)

    def _not_finite(self, step: int, loss: float, norm: float) -> None:
        self.checkpoints.wait()
        self.log.flush()
        good = self.checkpoints.latest
        kept = "no checkpoint was written yet" if good is None else (
            f"the last good checkpoint, of step {good}, is kept in {self.workdir / run.CHECKPOINTS}"
        )  # fmt: skip
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
        raise UserError(
            f"step {step}: {what} is not finite; {kept}. Lower init_lr, set clip, or look at the "
            "data, in another --workdir"
        )

    def _save(self) -> None:
        self.log.flush()
        extra = {"loader": self.loader.state(), "owed": self.owed}
        self.checkpoints.save(self.step, self.trainable, self.opt_state, extra)

    def _keep(self) -> str:
        """Save where the run stands, unless that is saved, and say so."""
        self._drain()
        if self.step and self.checkpoints.latest != self.step:
            self._save()
        self.checkpoints.wait()
        return f"step {self.step} is saved" if self.step else "no step was done yet"

    def _stop(self) -> None:
        """Save where the run stands and leave."""
        kept = self._keep()
        self.log.line(
            f"stopped by {self.stop.name}; {kept}: start the same command again to continue"
        )
        sys.stdout.flush()
        raise self.stop.end()

    # --- the end --------------------------------------------------------------------------------

    def _finish(self) -> Result:
        self.checkpoints.wait()
        self.log.flush()
        if self.stop:
            self._stop()
        done = self._result()
        loss = done.metrics["loss"]
        from minigpt4_jax.plots import loss_plot  # matplotlib

        loss_plot(self.workdir / METRICS, self.workdir / "loss.png")
        run.write_trained(  # the last thing to be written: a run that has it is done
            self.workdir, self.c, self.model_config, self.trainable,
            {"steps": self.step, "loss": loss, "seed": self.c.seed},
        )  # fmt: skip
        self.log.line(f"done: {self.step} steps, loss {loss:.4f}; the model is in {done.model}")
        return done

    def _result(self) -> Result:
        last: dict[str, float] = {}
        for record in read_metrics(self.workdir):
            last |= record
        return Result(self.workdir / run.MODEL, last, self.c.steps)
