"""What a run tells: metrics.jsonl, TensorBoard if asked for, and a line on the terminal."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
from etils import epath

from supmim_jax.config import Config
from supmim_jax.types import Batch, Metrics

IMPORTED = time.perf_counter()


class Diverged(Exception):
    """A loss term or the gradient is no longer finite."""


class MetricsWriter:
    """Appends {"step": s, name: value} lines to workdir/metrics.jsonl; process 0 only.

    Lines after `step`, from a run that was cut off later than its last checkpoint, are dropped
    first: each step has one line, however often the run was resumed.
    """

    def __init__(self, workdir: epath.Path, step: int, tensorboard: bool):
        self.path = workdir / "metrics.jsonl"
        self.active = jax.process_index() == 0
        self.tensorboard = None
        if not self.active:
            return
        if self.path.exists():
            kept = [
                x for x in self.path.read_text().splitlines(keepends=True) if _step_of(x) <= step
            ]
            part = self.path.with_suffix(".part")
            part.write_text("".join(kept))
            part.replace(self.path)
        if tensorboard:
            # clu's writers import TensorFlow, which a machine that trains need not have.
            from clu import metric_writers, periodic_actions

            self.tensorboard = metric_writers.SummaryWriter(str(workdir))
            self.profile = periodic_actions.Profile(logdir=workdir, first_profile=step + 10)

    def after_step(self, step: int) -> None:
        """With TensorBoard on, profiles some steps soon after the start and then every hour."""
        if self.tensorboard:
            self.profile(step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds one line; it is on disk when this returns."""
        if not self.active:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.tensorboard:
            self.tensorboard.write_scalars(step, values)
            self.tensorboard.flush()


def write_image(workdir: epath.Path, step: int, name: str, png: epath.Path) -> None:
    """Shows an image file in TensorBoard, beside the run's curves."""
    from clu import metric_writers
    from matplotlib import image

    writer = metric_writers.SummaryWriter(str(workdir))
    writer.write_images(step, {name: image.imread(png)[None, ..., :3]})
    writer.close()


def write_json(path: epath.Path, values: dict | list) -> None:
    """Writes the file so that a reader sees all of it or none."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, indent=1) + "\n")
    part.replace(path)


def _step_of(line: str) -> float:
    """Step of a line of metrics.jsonl; a line that was cut in the middle counts as the last."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")


class FiniteCheck:
    """Looks at each step's metrics one step late, so that the device is never kept waiting."""

    def __init__(self):
        self.pending: tuple[int, Metrics, jax.Array] | None = None

    def __call__(self, step: int, metrics: Metrics, batch: Batch) -> None:
        """Checks the step before and remembers this one.

        Raises:
          Diverged: a value is NaN or infinite; names the step, its terms and the ids.
        """
        previous, self.pending = self.pending, (step, metrics, batch.id)
        self._check(previous)

    def flush(self) -> None:
        """Checks the remembered step, so that no poisoned state is saved or reported."""
        previous, self.pending = self.pending, None
        self._check(previous)

    def _check(self, pending) -> None:
        if pending is None:
            return
        step, metrics, ids = pending
        values = {name: float(value) for name, value in metrics.items()}
        if np.isfinite(list(values.values())).all():
            return
        local = np.concatenate([np.asarray(shard.data) for shard in ids.addressable_shards])
        raise Diverged(
            f"Step {step} is not finite: {', '.join(f'{k}={v:g}' for k, v in values.items())}. "
            f"Ids of its batch: {', '.join(map(str, np.unique(local)))}. Nothing of this step was "
            f"saved. Lower config.optim.lr or set config.optim.clip (with another --workdir), or "
            f"look at these examples."
        )


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


SHOWN = (  # of a step, where there
    *("loss", "ce", "mim", "reconstruction", "position", "contrastive"),
    *("accuracy", "psnr", "code_usage"),
)


class ProgressLine:
    """One line that rewrites itself on a terminal; elsewhere a plain line every tenth of a run."""

    def __init__(self, cfg: Config, stream=None):
        self.name, self.total = cfg.objective.name, cfg.total_steps
        self.batch_size = cfg.batch_size
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
        terms = " ".join(f"{k} {values[k]:.3f}" for k in SHOWN if k in values)
        left = (self.total - step) * self.batch_size / values["images_per_second"]
        minutes, seconds = divmod(round(left), 60)
        line = (
            f"{self.name} {step}/{self.total} {100 * step // self.total:3d}% | {terms} | "
            f"{values['images_per_second']:.0f} img/s | "
            f"data {100 * values['data_wait']:.0f}% | {minutes}:{seconds:02d} left"
        )
        print(f"\r\x1b[K{line}" if self.terminal else line, end="", file=self.stream, flush=True)
        if not self.terminal:
            print(file=self.stream, flush=True)

    def started(self, step: int, metrics: Metrics) -> None:
        """Waits for a process's first step and says how long after the process began it is done."""
        jax.block_until_ready(metrics)
        self.say(f"Step {step} is done {seconds_since_start():.1f} s after this process began.")

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.active:
            print(("\r\x1b[K" if self.terminal else "") + text, file=self.stream, flush=True)
