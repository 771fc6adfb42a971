"""Trains an encoder: python -m supmim_jax.train --config configs/debug.py --workdir runs/supmim.

Run again with the same workdir, it continues from the newest checkpoint, bit for bit on the same
devices.
"""

import contextlib
import json
import os
from dataclasses import dataclass, field

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from supmim_jax import (
    checkpoint,
    cli,
    contrastive_boxes,
    encoder,
    evals,
    multihost,
    sharding,
    storage,
)
from supmim_jax.batch import Metrics, TrainState
from supmim_jax.checkpoint import Checkpoints
from supmim_jax.config import Config
from supmim_jax.config.configdict import from_configdict
from supmim_jax.data.loader import Dataset, Training
from supmim_jax.evals import ERRORS
from supmim_jax.init_from import InitialState
from supmim_jax.metrics import ROLLED_BACK, Clock, MetricsWriter, ProgressLine
from supmim_jax.tokenizers import Frozen
from supmim_jax.train_step import TrainStep
from supmim_jax.watchdog import Diverged, NanGuard, Watchdog
from supmim_jax.workdir import Workdir


def train(
    cfg: Config,
    workdir: str | os.PathLike,
    stop_at: int | None = None,
    devices: list[jax.Device] | None = None,
    use_older_checkpoint: bool = False,
) -> dict:
    """Trains to the end, evaluates, and returns the results.

    All that can fail is opened before anything is written.

    Args:
      cfg: the experiment.
      workdir: is given config.json, environment.json, metrics.jsonl, checkpoints/, results.json,
        of a classifier class_names.json, and of its tokenizer the identity and a codebook that was
        fitted.
      stop_at: saves and returns after this step, as if interrupted; the schedule is that of cfg.
      devices: what to train on; default: all of this run's.
      use_older_checkpoint: goes on from the newest whole checkpoint; damaged ones are set aside.

    Returns:
      what results.json holds; {} where a signal or `stop_at` ended the run before its end.

    Raises:
      SetupError: the config, the data, the devices or the workdir don't fit together.
      Diverged: a loss term or gradient is not finite.
    """
    line, mesh = ProgressLine(cfg), sharding.run_mesh(cfg, devices)
    step_fn = TrainStep.build(cfg, mesh)
    model = encoder.build_evaluation(cfg, cfg.eval.batch_size, mesh)
    dataset = Dataset.open(cfg)
    workdir = Workdir.open(workdir, cfg)
    if (results := workdir.results()) and not results.get(ERRORS):
        workdir.check_evaluated()
        line.say(f"{workdir.path} is complete; these are its results.")
        return results  # else what could not be measured may be now
    initial = None if checkpoint.steps(workdir.path) else InitialState.open(cfg, step_fn)
    evals.check(dataset, cfg.data.eval_split)
    frozen = Frozen.open(cfg, dataset, workdir.path, step_fn)
    fixed = sharding.put(frozen.arrays, step_fn.frozen)
    multihost.agree("frozen arrays", {"sha256": frozen.digests})
    names = dataset.class_names() if cfg.objective.leaves == "classifier" else ()
    with workdir.claimed(frozen, names):
        checkpoints = Checkpoints.open(workdir.path, cfg, step_fn.state)
        newest = checkpoints.newest(use_older_checkpoint)
        workdir.record_environment(newest.step if newest else 0, mesh)
        run = Run(workdir, dataset, step_fn, model, checkpoints, line)
        last = min(stop_at or cfg.total_steps, cfg.total_steps)
        while True:
            try:
                state = run.start(newest, initial)
                last, state = train_steps(run, last, state, fixed)
                break
            except Diverged as error:
                newest = run.roll_back(error)
        results = {}
        if last == cfg.total_steps:
            measured = run.evaluate(last, state)
            results = {
                "objective": cfg.objective.name,
                "epochs": cfg.epochs,
                "seconds": run.numbers["seconds"],
                "split": cfg.data.eval_split,
                **({"skipped_batches": x} if (x := run.numbers["skipped_batches"]) else {}),
                **measured.metrics,
                **({ERRORS: measured.errors} if measured.errors else {}),
            }
            if jax.process_index() == 0:  # last: with this file the run is complete
                storage.write_json(workdir.path / "results.json", results)
        checkpoints.close()
    return results


def train_steps(run: "Run", last: int, state: TrainState, fixed: dict) -> tuple[int, TrainState]:
    """Trains to step `last`, or to the one where a signal stops it, and saves that step.

    After a step comes, in this order: its line of metrics, a checkpoint, an evaluation, a pass for
    new boxes. The checkpoint is there before the other two begin, so that a run may end in them:
    one that goes on from it does what was due then and is not done.

    Raises:
      Diverged: a loss term or gradient is not finite.
      SetupError: the data or the workdir are no longer what the run needs.
    """
    cfg, first, guard = run.cfg, run.first, NanGuard()
    with Watchdog(cfg.watch) as run.watchdog, contextlib.ExitStack() as stack:
        if first < last:
            run.evaluate_if_due(first, state)
            run.find_boxes_if_due(first, state)
        batches = stack.enter_context(contextlib.closing(run.open_batches()))
        for step in range(first + 1, last + 1):
            with run.clock.waiting():
                batch = next(batches)
            state, metrics = run.step_fn.step(state, batch, fixed)
            guard(step, metrics, batch)
            if step == first + 1:
                run.line.started(step, metrics)
                multihost.hold()
            del batch  # here, where nothing waits: to give memory back takes its time
            run.clock.tick()
            run.watchdog.beat(step)
            run.writer.after_step(step)
            run.checkpoints.check()
            if step % cfg.log.every == 0 or step == last:
                guard.flush()
                run.log(step, metrics, batches)
            if multihost.told_to_stop(step):
                last = step
            if step == last or cfg.saves_after(step):
                guard.flush()
                run.save(step, state, batches)
            if step == last:
                break
            if cfg.evaluates_after(step) or cfg.finds_boxes_after(step):
                run.between_steps(step, state, batches)
        with run.watchdog.paused():
            run.checkpoints.wait()
        multihost.release()
    return last, state


@dataclass
class Run:
    """What a run in progress holds beside its state, and what it does between steps."""

    workdir: Workdir
    dataset: Dataset
    step_fn: TrainStep
    model: encoder.EncoderProgram | encoder.TokenizerProgram
    checkpoints: Checkpoints
    line: ProgressLine
    changes: dict[str, int] = field(default_factory=dict)  # of the numbers, by going back after NaN

    @property
    def cfg(self) -> Config:
        return self.workdir.cfg

    def start(
        self, saved: checkpoint.Checkpoint | None, initial: InitialState | None
    ) -> TrainState:
        """Resumes the run from one of its checkpoints, or begins it; returns the state there."""
        cfg, first = self.cfg, 0
        if saved:  # maybe at step 0: imported weights
            first, state = saved.step, saved.restore_state(self.step_fn.state)
        else:
            state = (initial or InitialState.open(cfg, self.step_fn)).make()
        self.first, self.saved, self.boxes = first, saved, None
        self.numbers = dict(saved.run if saved else checkpoint.BEGIN)
        self.clock = Clock(self.numbers["seconds"])
        path = self.workdir.path
        self.writer = MetricsWriter(path, first, cfg.total_steps, cfg.log.tensorboard)
        # Process 0 alone knows this.
        evaluated = multihost_utils.broadcast_one_to_all(np.bool_(self.writer.evaluated))
        self.evaluated = first if evaluated else None
        if self.changes:
            self.numbers |= {x: self.changes[x] for x in ("skipped_batches", "roll_backs")}
            self.writer.write(first, self.changes)
        elif first:
            self.line.say(f"Resuming {path} from step {first} of {cfg.total_steps}.")
        return state

    def open_batches(self) -> Training:
        """The training batches after the first step."""
        numbers = self.numbers
        before = numbers["broken_records"], self.boxes, numbers["skipped_batches"]
        return self.dataset.train(self.step_fn.mesh, self.first, *before)

    def log(self, step: int, metrics: Metrics, batches: Training) -> None:
        """Writes and shows a line of metrics."""
        values = {k: float(v) for k, v in metrics.items()} | self.clock.window(self.cfg.batch_size)
        values["broken_records"] = batches.broken(step)
        if self.numbers["skipped_batches"]:
            values["skipped_batches"] = self.numbers["skipped_batches"]
        self.writer.write(step, values)
        self.line.show(step, values)

    def save(self, step: int, state: TrainState, batches: Training) -> None:
        """Starts to save the state, with the numbers that a resumed run needs."""
        self.numbers |= {
            "position": (step + self.numbers["skipped_batches"]) * self.cfg.batch_size,
            "seconds": self.clock.seconds,
            "broken_records": batches.broken(step),
        }
        self.writer.flush()  # a run that goes on from here does not write these lines again
        with self.watchdog.paused():  # it waits for the save before, which may take long
            self.checkpoints.save(state, self.cfg, self.numbers, self.boxes)

    def between_steps(self, step: int, state: TrainState, batches: Training) -> None:
        """Does what is due after a saved step; a run that is told to stop ends here."""
        with self.clock.stopped(), self.watchdog.paused():
            with multihost.released():
                self.evaluate_if_due(step, state)
                self.find_boxes_if_due(step, state)
            if self.cfg.finds_boxes_after(step):
                batches.restart(step, self.boxes)

    def evaluate_if_due(self, step: int, state: TrainState) -> None:
        """Evaluates after `step`, if the schedule says so and it has not been done."""
        if self.cfg.evaluates_after(step) and step != self.evaluated:
            self.evaluate(step, state)

    def evaluate(self, step: int, state: TrainState) -> evals.Results:
        """Runs all evaluations of the encoder or tokenizer; writes and prints the results."""
        split = self.cfg.data.eval_split
        bound = self.model.bind(state.judged)
        results = evals.run_all(bound, self.dataset, split, self.step_fn.mesh)
        metrics = results.metrics
        self.writer.write(step, {f"eval/{name}": value for name, value in metrics.items()})
        shown = ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())
        self.line.say(f"step {step}, {split}: {shown}")
        for name, reason in results.errors.items():
            self.line.say(f"step {step}, {split}: {name} cannot be measured. {reason}")
        self.checkpoints.best.measured(step, metrics)
        return results

    def find_boxes_if_due(self, step: int, state: TrainState) -> None:
        """Sets the boxes to crop by after `step`, found now or before this process started."""
        if self.cfg.finds_boxes_after(step):
            bound = self.model.bind(state.judged)
            self.boxes = contrastive_boxes.boxes(bound, self.dataset, self.step_fn.mesh)
        elif self.boxes is None and self.saved:
            self.boxes = self.saved.restore_boxes()

    def roll_back(self, error: Diverged) -> checkpoint.Checkpoint | None:
        """The newest scheduled checkpoint, to continue from without the batches since.

        Not one that a signal brought about: which batches are left out depends on the schedule
        alone, and a run that is ended before or after goes the same way.

        Raises:
          Diverged: config.watch allows no roll-back, or not one more.
        """
        times, allowed = self.numbers["roll_backs"], self.cfg.watch.roll_backs
        self.checkpoints.wait()  # or what is good of the run might be lost with it
        if times >= allowed:
            before = f" It went back {times} times before." if times else ""
            raise Diverged(f"{error}{before}", error.step) from None
        step = self.checkpoints.back_to_scheduled()
        multihost.release()  # all that is good is saved
        self.line.say(
            f"{error}\nGoing back to step {step}, time {times + 1} of {allowed}; the "
            f"{error.step - step} batches since are left out."
        )
        self.changes = {
            ROLLED_BACK: error.step,
            "skipped_batches": self.numbers["skipped_batches"] + error.step - step,
            "roll_backs": times + 1,
        }
        return self.checkpoints.newest()


def main() -> None:
    cli.join()
    cfg = from_configdict(CONFIG.value)
    command = {"workdir": WORKDIR.value, "use_older_checkpoint": USE_OLDER.value}
    cli.agree(cfg, command)
    results = train(cfg, WORKDIR.value, use_older_checkpoint=USE_OLDER.value)
    if not results:
        message, code = multihost.stopped()
        cli.fail(f"{message} ({WORKDIR.value})", code)
    if jax.process_index() == 0:
        print(f"{WORKDIR.value}: {json.dumps(results)}")
    if errors := results.get(ERRORS):
        cli.fail(evals.told(errors, WORKDIR.value), multihost.EXIT_SETUP)


if __name__ == "__main__":
    CONFIG = cli.define("Experiment: configs/<name>.py")
    WORKDIR = storage.define("workdir", None, "Directory of this run; it resumes if it can.")
    USE_OLDER = flags.DEFINE_bool(
        "use_older_checkpoint", False, "If the newest is damaged, set it aside; use one before it."
    )
    cli.define_process_flags()
    flags.mark_flags_as_required(["config", "workdir"])
    cli.start(main)
