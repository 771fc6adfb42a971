"""What a run reports: metrics.jsonl, TensorBoard if asked for, and a line on the terminal."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import jax
from etils import epath

from supmim_jax import storage
from supmim_jax.batch import Metrics
from supmim_jax.config import Config

IMPORTED = time.perf_counter()
ROLLED_BACK = "rolled_back_from"
BUCKET_EVERY = 5.0  # seconds between uploads of metrics.jsonl


class MetricsWriter:
    """Appends {"step": s, name: value} lines to workdir/metrics.jsonl; process 0 only.

    What comes after the checkpoint of `step`, in a run that was cut off later, is dropped first:
    each step has one line of training and one of evaluation, however often the run was resumed.

    An object of a bucket cannot be appended to: there the file is written anew, every few seconds,
    before each checkpoint and after each evaluation.

    Args:
      workdir: of the run.
      step: that the run goes on from.
      last: the run's last step. Its evaluation gives the results, and is never taken as read.
      tensorboard: also writes for TensorBoard.
    """

    def __init__(self, workdir: epath.Path, step: int, last: int, tensorboard: bool):
        self.path = workdir / "metrics.jsonl"
        self.active = jax.process_index() == 0
        self.tensorboard = None
        self.evaluated = False  # whether the evaluation after `step` is there
        self.lines, self.flushed = [], time.monotonic()  # of a file in a bucket, all there are
        if self.active and self.path.exists():
            for line in self.path.read_text().splitlines(keepends=True):
                found = values(line)
                comes_after = ROLLED_BACK in found or (step == last and _is_evaluation(found))
                if found["step"] < step or (found["step"] == step and not comes_after):
                    self.lines.append(line)
                    self.evaluated |= found["step"] == step and _is_evaluation(found)
            storage.write(self.path, "".join(self.lines))
        if self.active and tensorboard:
            # clu's writers import TensorFlow, which a machine that trains need not have.
            from clu import metric_writers, periodic_actions

            self.tensorboard = metric_writers.SummaryWriter(str(workdir))
            self.profile = periodic_actions.Profile(logdir=workdir, first_profile=step + 10)

    def after_step(self, step: int) -> None:
        """With TensorBoard on, profiles some steps soon after the start and then every hour."""
        if self.tensorboard:
            self.profile(step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds one line; on a local disk it is handed to the system when this returns."""
        if not self.active:
            return
        line = json.dumps({"step": step, **values}) + "\n"
        if storage.is_local(self.path):
            with self.path.open("a") as file:
                file.write(line)
        else:
            self.lines.append(line)
            if _is_evaluation(values) or time.monotonic() - self.flushed > BUCKET_EVERY:
                self.flush()
        if self.tensorboard:
            self.tensorboard.write_scalars(step, values)
            self.tensorboard.flush()

    def flush(self) -> None:
        """All lines are in the file when this returns."""
        if self.active and not storage.is_local(self.path):
            storage.write(self.path, "".join(self.lines))
            self.flushed = time.monotonic()


def values(line: str) -> dict:
    """A line of metrics.jsonl; one that was cut in the middle counts as after all steps."""
    try:
        return {"step": float("inf")} | json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return {"step": float("inf")}


def _is_evaluation(values: dict) -> bool:
    return any(name.startswith("eval/") for name in values)


def seconds_since_start() -> float:
    """Seconds since this process began, in steps of the kernel's clock (10 ms).

    Without /proc (macOS), since this module was imported, some seconds less.
    """
    try:
        up = float(Path("/proc/uptime").read_text().split()[0])
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.perf_counter() - IMPORTED
    return up - int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22: starttime


class Clock:
    """Seconds of training, and what share of them waited for data; evaluations don't count."""

    def __init__(self, seconds: float):
        self.seconds = seconds  # so far, earlier attempts of a resumed run included
        self.last = time.perf_counter()
        self._open_window()

    @contextlib.contextmanager
    def waiting(self):
        """The time inside is spent waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def stopped(self):
        """The time inside is not training."""
        start = time.perf_counter()
        yield
        self.last += time.perf_counter() - start

    def tick(self) -> None:
        """A step was dispatched."""
        now = time.perf_counter()
        self.seconds += now - self.last
        self.window_seconds += now - self.last
        self.last = now
        self.steps += 1

    def window(self, batch_size: int) -> dict[str, float]:
        """Images per second and share of time that waited for data, since the last call."""
        rates = {
            "images_per_second": self.steps * batch_size / self.window_seconds,
            "data_wait": self.waited / self.window_seconds,
        }
        self._open_window()
        return rates

    def _open_window(self) -> None:
        self.steps, self.window_seconds, self.waited = 0, 0.0, 0.0


class ProgressLine:
    """One line that rewrites itself on a terminal; elsewhere a plain line every tenth of a run."""

    def __init__(self, cfg: Config, stream=None):
        self.objective, self.total, self.batch_size = cfg.objective, cfg.total_steps, cfg.batch_size
        self.stream = stream or sys.stderr
        self.active = jax.process_index() == 0
        self.terminal = self.stream.isatty()
        self.tenth = -1

    def show(self, step: int, values: dict[str, float]) -> None:
        """Step, per cent, loss terms, images/s, share of time waiting for data, time left."""
        tenth = 10 * step // self.total
        if not self.active or (not self.terminal and tenth == self.tenth):
            return
        self.tenth = tenth
        terms = " ".join(f"{k} {values[k]:.3f}" for k in self.objective.terms if k in values)
        left = (self.total - step) * self.batch_size / values["images_per_second"]
        minutes, seconds = divmod(round(left), 60)
        line = (
            f"{self.objective.name} {step}/{self.total} {100 * step // self.total:3d}% | {terms} | "
            f"{values['images_per_second']:.0f} img/s | "
            f"data {100 * values['data_wait']:.0f}% | {minutes}:{seconds:02d} left"
        )
        start, end = ("\r\x1b[K", "") if self.terminal else ("", "\n")
        print(start + line, end=end, file=self.stream, flush=True)

    def started(self, step: int, metrics: Metrics) -> None:
        """Waits for a process's first step and says how long after the process began it is done."""
        jax.block_until_ready(metrics)
        self.say(f"Step {step} is done {seconds_since_start():.1f} s after this process began.")

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.active:
            print(("\r\x1b[K" if self.terminal else "") + text, file=self.stream, flush=True)
