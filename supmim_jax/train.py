"""Trains an encoder: python -m supmim_jax.train --config configs/debug.py --workdir runs/supmim.

Run again with the same workdir, it continues from the newest checkpoint, bit for bit on the same
devices.


The training loop: from the newest checkpoint, step by step, and what is due between steps."""

import contextlib
import json

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from supmim_jax import (
    checkpoint,
    cli,
    contrastive_boxes,
    encoder,
    evals,
    init_from,
    multihost,
    sharding,
    storage,
    tokenizers,
    train_step,
)
from supmim_jax import workdir as workdir_module
from supmim_jax.batch import Metrics, TrainState
from supmim_jax.config import Config
from supmim_jax.config.configdict import from_configdict
from supmim_jax.data import loader
from supmim_jax.encoder import Inference, TokenizerProgram
from supmim_jax.evals import ERRORS
from supmim_jax.metrics import ROLLED_BACK, Clock, MetricsWriter, ProgressLine, write_json
from supmim_jax.nan_guard import Diverged, FiniteCheck
from supmim_jax.train_step import Program
from supmim_jax.watchdog import StallWatch


class Loop:
    """A run that goes on in this process.

    After a step comes, in this order: its line of metrics, a checkpoint, an evaluation, a pass for
    new boxes. The checkpoint is there before the other two begin, so that a run may end in them:
    one that goes on from it does what was due then and is not done.
    """

    def __init__(
        self,
        cfg: Config,
        workdir: epath.Path,
        mesh: Mesh,
        prog: Program,
        subject: Inference | TokenizerProgram,
        fixed: dict,
        checkpoints: checkpoint.Checkpoints,
    ):
        self.cfg, self.workdir, self.mesh, self.prog = cfg, workdir, mesh, prog
        self.subject, self.fixed, self.checkpoints = subject, fixed, checkpoints
        self.line = ProgressLine(cfg)

    def to(self, last: int) -> tuple[int, TrainState]:
        """Trains to step `last`, or to the one where a signal stops it, and saves that step.

        Raises:
          Diverged: a loss term or gradient is not finite, and config.watch allows no roll-back.
          SetupError: the data or the workdir are no longer what the run needs.
        """
        changes = {}
        while True:
            first, state = self._begin(changes)
            try:
                with StallWatch(self.cfg.watch) as self.stall:
                    return self._steps(first, last, state)
            except Diverged as error:
                changes = self._back(error)

    def evaluate(self, step: int, state: TrainState) -> evals.Results:
        """All evaluations of the encoder, or of the tokenizer, as it is; written and shown."""
        cfg, split = self.cfg, self.cfg.data.eval_split
        results = evals.run_all(self.subject.bind(state.judged), cfg, split, self.mesh)
        metrics = results.metrics
        self.writer.write(step, {f"eval/{name}": value for name, value in metrics.items()})
        shown = ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())
        self.line.say(f"step {step}, {split}: {shown}")
        for name, reason in results.errors.items():
            self.line.say(f"step {step}, {split}: {name} cannot be measured. {reason}")
        self.checkpoints.found(step, metrics)
        return results

    def _begin(self, changes: dict) -> tuple[int, TrainState]:
        """The newest checkpoint, or the state of step 0; `changes` are made to its numbers."""
        cfg, newest = self.cfg, self.checkpoints.latest()
        if newest is not None:  # 0: imported weights
            state, self.numbers = self.checkpoints.restore(newest, self.prog.state)
        else:
            state, self.numbers = init_from.state(cfg, self.prog), dict(checkpoint.BEGIN)
        first = newest or 0
        self.writer = MetricsWriter(self.workdir, first, cfg.total_steps, cfg.log.tensorboard)
        self.evaluated = first if _first_process_says(self.writer.evaluated) else None
        if changes:
            self.numbers |= {name: changes[name] for name in ("skipped_batches", "roll_backs")}
            self.writer.write(first, changes)
        elif first:
            self.line.say(f"Resuming {self.workdir} from step {first} of {cfg.total_steps}.")
        return first, state

    def _steps(self, first: int, last: int, state: TrainState) -> tuple[int, TrainState]:
        cfg, finite = self.cfg, FiniteCheck()
        self.clock, self.boxes = Clock(self.numbers["seconds"]), None
        if first < last:
            self._evaluate_if_due(first, state)
            self._find_boxes(first, state)
        before = self.numbers["broken_records"], self.boxes, self.numbers["skipped_batches"]
        with contextlib.closing(loader.train_dataset(cfg, self.mesh, first, *before)) as batches:
            for step in range(first + 1, last + 1):
                with self.clock.waiting():
                    batch = next(batches)
                state, metrics = self.prog.step(state, batch, self.fixed)
                finite(step, metrics, batch)
                if step == first + 1:
                    self.line.started(step, metrics)
                    multihost.hold()
                del batch  # here, where nothing waits: to give memory back takes its time
                self.clock.tick()
                self.stall.beat(step)
                self.writer.after_step(step)
                self.checkpoints.check()
                if step % cfg.log.every == 0 or step == last:
                    finite.flush()
                    self._log(step, metrics, batches)
                if multihost.told_to_stop(step):
                    last = step
                if step == last or cfg.saves_after(step):
                    finite.flush()
                    self._save(step, state, batches)
                if step == last:
                    break
                if cfg.evaluates_after(step) or cfg.finds_boxes_after(step):
                    self._between(step, state, batches)
        with self.stall.paused():
            self.checkpoints.wait()
        multihost.release()
        return last, state

    def _log(self, step: int, metrics: Metrics, batches: loader.Training) -> None:
        values = {k: float(v) for k, v in metrics.items()} | self.clock.window(self.cfg.batch_size)
        values["broken_records"] = batches.broken(step)
        if self.numbers["skipped_batches"]:
            values["skipped_batches"] = self.numbers["skipped_batches"]
        self.writer.write(step, values)
        self.line.show(step, values)

    def _save(self, step: int, state: TrainState, batches: loader.Training) -> None:
        self.numbers |= {
            "position": (step + self.numbers["skipped_batches"]) * self.cfg.batch_size,
            "seconds": self.clock.seconds,
            "broken_records": batches.broken(step),
        }
        self.writer.flush()  # a run that goes on from here does not write these lines again
        with self.stall.paused():  # it waits for the one before, which may take long
            self.checkpoints.save(state, self.cfg, self.numbers, self.boxes)

    def _between(self, step: int, state: TrainState, batches: loader.Training) -> None:
        """What is due after a step that is saved; a run that is told to stop ends in it."""
        with self.clock.stopped(), self.stall.paused():
            with multihost.released(self.checkpoints.wait):
                self._evaluate_if_due(step, state)
                self._find_boxes(step, state)
            if self.cfg.finds_boxes_after(step):
                batches.restart(step, self.boxes)

    def _evaluate_if_due(self, step: int, state: TrainState) -> None:
        if self.cfg.evaluates_after(step) and step != self.evaluated:
            self.evaluate(step, state)

    def _find_boxes(self, step: int, state: TrainState) -> None:
        """The boxes to crop by after `step`: found now, or before this process began."""
        if self.cfg.finds_boxes_after(step):
            encoder = self.subject.bind(state.judged)
            self.boxes = contrastive_boxes.boxes(encoder, self.cfg, self.mesh)
        elif self.boxes is None:
            self.boxes = self.checkpoints.restore_boxes(step, self.cfg)

    def _back(self, error: Diverged) -> dict:
        """What changes in the run's numbers as it goes back to its newest scheduled checkpoint.

        Not to one that a signal brought about: which batches are left out depends on the schedule
        alone, and a run that is ended before or after goes the same way.
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
        return {
            ROLLED_BACK: error.step,
            "skipped_batches": self.numbers["skipped_batches"] + error.step - step,
            "roll_backs": times + 1,
        }


def _first_process_says(answer: bool) -> bool:
    """Process 0's answer, on all."""
    if jax.process_count() > 1:
        answer = multihost_utils.broadcast_one_to_all(np.bool_(answer))
    return bool(answer)


def train(
    cfg: Config,
    workdir: str | epath.Path,
    stop_at: int | None = None,
    devices: list[jax.Device] | None = None,
    use_older_checkpoint: bool = False,
) -> dict:
    """Trains to the end, evaluates, and returns the results.

    Args:
      cfg: the experiment.
      workdir: is given config.json, environment.json, metrics.jsonl, checkpoints/, results.json,
        and of its tokenizer the identity and a codebook that was fitted.
      stop_at: saves and returns after this step, as if interrupted; the schedule is that of cfg.
      devices: what to train on; default: all of this run's.
      use_older_checkpoint: goes on from the newest whole checkpoint; damaged ones are set aside.

    Raises:
      SetupError: the config, the data, the devices or the workdir don't fit together.
      Diverged: a loss term or gradient is not finite.
    """
    mesh = sharding.make_mesh(cfg.mesh, devices)
    prog = train_step.build(cfg, mesh)
    subject = encoder.build_evaluation(cfg, cfg.eval.batch_size, mesh)
    loader.check(cfg)
    workdir = storage.location(workdir)
    workdir_module.check(workdir, cfg)
    if (workdir / "results.json").exists():  # written last, so the run is complete
        results = workdir_module.results(workdir)
        if not results.get(ERRORS):  # or what could not be measured may be now
            ProgressLine(cfg).say(f"{workdir} is complete; these are its results.")
            return results
    if not checkpoint.steps(workdir):
        init_from.check(cfg, prog.state.params)
    evals.check(cfg, cfg.data.eval_split)
    tokenizers.check_cache(cfg, workdir, mesh)
    host_arrays = tokenizers.arrays(cfg, workdir, prog.frozen)
    tokenizers.check_kept(host_arrays, cfg, workdir)
    multihost.agree("frozen arrays", {"sha256": tokenizers.digests(host_arrays)})
    with workdir_module.taken(workdir, cfg):
        workdir_module.make(workdir, cfg, host_arrays)
        workdir_module.check_shared(workdir)
        checkpoints = checkpoint.Checkpoints(workdir, cfg.checkpoint, cfg.saves_after)
        newest = checkpoints.newest(use_older_checkpoint)
        checkpoints.check_room(prog.state)
        workdir_module.record_environment(workdir, newest or 0, mesh)
        fixed = sharding.put(host_arrays, prog.frozen)
        run = Loop(cfg, workdir, mesh, prog, subject, fixed, checkpoints)
        last, state = run.to(min(stop_at or cfg.total_steps, cfg.total_steps))
        results = {}
        if last == cfg.total_steps:
            found = run.evaluate(last, state)
            results = {
                "objective": cfg.objective.name,
                "epochs": cfg.epochs,
                "seconds": run.numbers["seconds"],
                "split": cfg.data.eval_split,
                **({"skipped_batches": x} if (x := run.numbers["skipped_batches"]) else {}),
                **found.metrics,
                **({ERRORS: found.errors} if found.errors else {}),
            }
            if jax.process_index() == 0:
                write_json(workdir / "results.json", results)
        checkpoints.close()
    return results


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
