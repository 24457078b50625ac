"""An open run: its restored state, checkpoints and log."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from minigpt4_jax.data.skipped import SkipCounter
from minigpt4_jax.errors import UserError
from minigpt4_jax.parallel.multihost import (
    all_gather_json,
    is_main_process,
    is_multiprocess,
    raise_together,
)
from minigpt4_jax.parallel.sharding import replicate
from minigpt4_jax.training.checkpoints import Checkpoints
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.logs import NullLog, RunLog
from minigpt4_jax.training.setup import Program, RunInputs, build_program
from minigpt4_jax.training.train_step import OptState, Trainable
from minigpt4_jax.training.workdir import CHECKPOINTS, MODEL, record_config


@dataclass
class Run:
    """What the training loop works on."""

    c: TrainConfig
    workdir: Path
    inputs: RunInputs
    program: Program
    checkpoints: Checkpoints
    log: RunLog
    # the state
    step: int  # updates dispatched
    trainable: Trainable
    opt_state: OptState
    pending_evaluations: list[str]  # of this step, such as VAL_LOSS: left undone by a stop
    config_recorded: bool = False  # in config.json, since this start

    def save_checkpoint(self) -> None:
        """Flush the log, then save the state in the background. UserError: it cannot be written."""
        self.checkpoints.wait()
        try:
            self.log.flush()
            if is_main_process() and not self.config_recorded:
                record_config(self.workdir, self.c)
                self.config_recorded = True
        except UserError as e:
            raise UserError(f"{e}; {self.checkpoints.describe_saved_state()}") from e
        position = self.inputs.loader.state() | {"tally": self.count_skipped().state()}
        extra = {"loader": position, "owed": self.pending_evaluations}
        self.checkpoints.save(self.step, self.trainable, self.opt_state, extra)

    def count_skipped(self) -> SkipCounter:
        """The rows read and skipped by all processes. Collective."""
        counter = self.inputs.loader.skip_counter
        if not is_multiprocess():
            return counter
        return SkipCounter.total(all_gather_json(counter.report()))


def _advice_on_damage(workdir: Path) -> str:
    """What to do if all checkpoints are damaged."""
    if (workdir / MODEL).exists():  # of a finished run that is extended
        return f"train {workdir / MODEL}, which the run has finished, further in another --workdir"
    return "remove that directory to start the run again, or choose another --workdir"


def open_run(c: TrainConfig, workdir: Path, inputs: RunInputs, exit_stack: ExitStack) -> Run:
    """Load the model, restore the last checkpoint if there is one, and open the log.

    exit_stack: closes checkpoints and log. UserError: what is wrong with them or the weights.
    """
    checkpoints = Checkpoints(workdir / CHECKPOINTS, c.keep)
    exit_stack.callback(checkpoints.close)
    with raise_together():
        program, trainable, opt_state = build_program(c, inputs)
    restored = checkpoints.restore(trainable, opt_state, _advice_on_damage(workdir))
    step, pending_evaluations = 0, list[str]()
    if restored is not None:
        step, pending_evaluations = restored.step, restored.extra["owed"]
        trainable, opt_state = replicate((restored.trainable, restored.opt_state), inputs.mesh)
        position = restored.extra["loader"]
        if not is_main_process():  # counts of skipped rows are summed over processes
            position = position | {"tally": {}}
        with raise_together():
            inputs.loader.restore(position)
    with raise_together():
        log = (
            RunLog(workdir, step, c.steps, pending_evaluations) if is_main_process() else NullLog()
        )
    exit_stack.callback(log.close)
    for message in restored.messages if restored else ():
        log.write_line(message)
    return Run(
        c, workdir, inputs, program, checkpoints, log, step, trainable, opt_state,
        pending_evaluations,
    )  # fmt: skip
