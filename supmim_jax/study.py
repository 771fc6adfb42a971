"""Paired runs over seeds: python -m supmim_jax.study --study configs/studies/x.py --out runs/x.

A study file's `study()` returns a Study: the runs to compare, each to be trained with every seed.
Runs with the same seed see the same images in the same order, and their encoders start alike. A
cell is one run with one seed; a process of its own trains and probes it in <out>/<name>-<seed>. Run
again, the command continues where it stopped; --only trains some cells. It tabulates the cells that
are done.

<out> gets results.jsonl (a line for each cell), table.md and figure.svg.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath
from scipy import stats

from supmim_jax import cli, environment, multihost, probe, sharding, storage
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import Config, ProbeConfig
from supmim_jax.errors import SetupError, first_few
from supmim_jax.rehearse import flops
from supmim_jax.report.measure import environments
from supmim_jax.train import train

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Study:
    """The runs to compare, and the metrics to compare them by."""

    question: str
    runs: dict[str, Config]  # by name; their seed is set by the study
    baseline: str  # the run that the others are compared with
    seeds: tuple[int, ...]
    probe: ProbeConfig  # what each trained encoder is measured by
    metrics: dict[str, str]  # those of the table, with their titles

    def __post_init__(self):
        if odd := [name for name in self.runs if not re.fullmatch(r"[\w.+ -]+", name)]:
            raise SetupError(
                f"runs has {first_few([repr(name) for name in odd])}; names of runs are parts of "
                f"directories and of --only: take letters, digits, spaces and any of . _ + -."
            )
        cells = [f"{name}-{seed}" for name in self.runs for seed in self.seeds]
        if twice := [name for name in self.runs if name in cells]:
            raise SetupError(
                f"runs has {first_few(twice)}, which is also the name of another run's cell "
                f"(<run>-<seed>); choose another name."
            )
        if self.baseline not in self.runs:
            raise SetupError(f"baseline is {self.baseline!r}; runs are {', '.join(self.runs)}.")
        given = self.probe.eval.metrics
        if unknown := [metric for metric in self.metrics if metric not in given]:
            raise SetupError(
                f"metrics has {first_few(unknown)}; probe.eval gives {', '.join(given)}."
            )

    def config(self, cell: "Cell") -> Config:
        """The config that the cell trains."""
        return dataclasses.replace(self.runs[cell.run], seed=cell.seed)


class Cell(NamedTuple):
    run: str
    seed: int

    def __str__(self) -> str:
        return f"{self.run}-{self.seed}"


def train_cell(study: Study, cell: Cell, directory: epath.Path) -> None:
    """Trains and probes one cell; the results are a file in its workdir, written last."""
    cfg = study.config(cell)
    # Before hours of training: what the probe cannot do.
    probe.open_data(cfg, study.probe, sharding.make_mesh(study.probe.mesh))
    probed = environment.collect(jax.devices())  # now: later the files of this code may be others
    if not train(cfg, directory):
        cli.fail(*multihost.stopped())
    report = probe.probe(Checkpoint.open(str(directory)), study.probe)
    storage.write_json(
        directory / "study.json",
        {
            **cell._asdict(),
            "metrics": report.results.metrics,
            "errors": report.results.errors,
            "split": report.data.eval_split,
            "steps": report.checkpoint.step,
            "seconds": report.checkpoint.run["seconds"],
            "compute": compute(cfg),
            "config_sha256": digest(cfg),
            "trained": environments(directory),
            "probed": probed,
        },
    )


def compute(cfg: Config) -> int:
    """FLOPs of the whole run by arithmetic; 0 if the objective has no formula."""
    return flops.total(cfg).model * cfg.batch_size * cfg.total_steps


def as_costly(cfg: Config, other: Config) -> Config:
    """`cfg` with as many epochs as cost the FLOPs of the run `other`.

    Raises:
      SetupError: there is no arithmetic for the objective of one.
    """
    if not (compute(cfg) and compute(other)):
        raise SetupError("as_costly: FLOPs are known of objectives with a ViT encoder only.")
    return dataclasses.replace(cfg, epochs=cfg.epochs * compute(other) / compute(cfg))


def digest(cfg: Config) -> str:
    """SHA-256 of the config, the same on every machine.

    Of a path, such as that of a tokenizer, only the last part counts, and of data_dir nothing.
    """

    def shared(values: Any) -> dict:
        found = {}
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            if field.metadata.get("path"):
                value = "" if field.name == "data_dir" else os.path.basename(value)
            found[field.name] = shared(value) if dataclasses.is_dataclass(value) else value
        return found

    return hashlib.sha256(json.dumps(shared(cfg), sort_keys=True).encode()).hexdigest()


def recorded(out: epath.Path) -> dict[Cell, dict]:
    """The rows of results.jsonl, by cell.

    Raises:
      SetupError: a line is damaged.
    """
    path, found = out / "results.jsonl", {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            row = json.loads(line)
            found[Cell(row["run"], row["seed"])] = row
        except (ValueError, KeyError, TypeError) as error:
            raise SetupError(
                f"{path}, line {number}, is not a cell's: {type(error).__name__}: {error}. Remove "
                f"the line; its cell is read from its own directory, or trained again."
            ) from None
    return found


def measured(study: Study, out: epath.Path) -> list[dict]:
    """The row of each cell that is done, in the order of runs and seeds.

    Raises:
      SetupError: a cell was trained with another config than the study now has.
    """
    found, rows = recorded(out), []
    for cell in (Cell(run, seed) for run in study.runs for seed in study.seeds):
        path = out / str(cell) / "study.json"
        if path.exists():
            found[cell] = storage.read_json(path, "Remove it to measure again.")
        if cell not in found:
            continue
        if found[cell]["config_sha256"] != digest(study.config(cell)):
            raise SetupError(
                f"{out} has {cell} of another config than the study. Choose another --out, or "
                f"remove {path.parent} and the cell's line in results.jsonl to train it again."
            )
        rows.append(found[cell])
    return rows


class Compared(NamedTuple):
    """A metric of one run over its seeds, and its differences to the baseline's."""

    mean: float
    differences: np.ndarray  # of the seeds that both have
    margin: float  # half the confidence interval of their mean, by Student's t; NaN below two


def compared(rows: list[dict], baseline: str, run: str, metric: str) -> Compared | None:
    """Compares `run` with the baseline, seed by seed; None if nothing was measured."""

    def values(name: str) -> dict[int, float]:
        found = {row["seed"]: row["metrics"] for row in rows if row["run"] == name}
        return {seed: metrics[metric] for seed, metrics in found.items() if metric in metrics}

    own, base = values(run), values(baseline)
    if not own:
        return None
    paired = np.array([own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())])
    margin = math.nan
    if len(paired) > 1:
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(paired) - 1)
        margin = float(quantile * paired.std(ddof=1) / math.sqrt(len(paired)))
    return Compared(float(np.mean(list(own.values()))), paired, margin)


def table(study: Study, rows: list[dict]) -> str:
    """A Markdown table: means over seeds, and paired differences with their intervals."""
    lines = [{"run": "run", "seeds": "seeds", "compute": "compute", **study.metrics}]
    base = compute(study.runs[study.baseline])
    for run, cfg in study.runs.items():
        own = [row for row in rows if row["run"] == run]
        if not own:
            continue
        line = {"run": run, "seeds": str(len(own)), "compute": "-"}
        if base:
            line["compute"] = f"{compute(cfg) / base:.2f}"
        for metric in study.metrics:
            found = compared(rows, study.baseline, run, metric)
            line[metric] = f"{found.mean:.2f}" if found else "-"
            if found and run != study.baseline and len(found.differences):
                interval = "" if math.isnan(found.margin) else f" ± {found.margin:.2f}"
                line[metric] += f" ({found.differences.mean():+.2f}{interval})"
        lines.append(line)
    cells = [[x.replace("|", r"\|") for x in line.values()] for line in lines]
    text = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([text[0], "|---" * len(lines[0]) + "|", *text[1:]])


def figure(study: Study, rows: list[dict]) -> bytes:
    """Differences to the baseline as SVG: a panel for each metric, a dot for each seed."""
    from matplotlib.figure import Figure

    others = [run for run in study.runs if run != study.baseline][::-1]
    drawing = Figure(figsize=(2.6 * len(study.metrics) + 1.5, 0.5 * len(others) + 1.6))
    axes = drawing.subplots(1, len(study.metrics), sharey=True, squeeze=False)[0]
    for axis, (metric, title) in zip(axes, study.metrics.items()):
        axis.axvline(0, color="grey", linewidth=0.8)
        for place, run in enumerate(others):
            found = compared(rows, study.baseline, run, metric)
            if not found or not len(found.differences):
                continue
            below = [place - 0.2] * len(found.differences)
            axis.plot(found.differences, below, ".", color="grey", markersize=4)
            margin, mean = np.nan_to_num(found.margin), found.differences.mean()
            axis.errorbar(mean, place, xerr=margin, fmt="o", capsize=3, color="C0")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(f"points above {study.baseline}", fontsize=8)
        axis.set_yticks(range(len(others)), others, fontsize=8)
        axis.set_ylim(-0.6, len(others) - 0.4)
    legend = f"Means with {CONFIDENCE:.0%} confidence intervals; small dots: seeds."
    drawing.suptitle(f"{study.question} {legend}", fontsize=8)
    drawing.tight_layout()
    file = io.BytesIO()
    drawing.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def write(study: Study, out: epath.Path) -> list[dict]:
    """Writes the three files from the cells that are done; returns their rows."""
    rows = measured(study, out)
    cells = recorded(out) | {Cell(row["run"], row["seed"]): row for row in rows}
    lines = "".join(json.dumps(row) + "\n" for row in cells.values())
    storage.write(out / "results.jsonl", lines)
    if rows:
        storage.write(out / "table.md", f"{study.question}\n\n{table(study, rows)}\n")
        storage.write(out / "figure.svg", figure(study, rows))
    return rows


@dataclass
class Pool:
    """Cells in progress, each in a process with its share of the cores, or its own GPU."""

    command: list[str]
    out: epath.Path
    slots: list[str]  # a GPU's number each; "" for none
    running: dict[int, tuple[Cell, subprocess.Popen]] = dataclasses.field(default_factory=dict)
    # `stop` comes from a thread of its own: held while a cell starts, and once all were told.
    starting: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def start(self, cell: Cell) -> None:
        """Starts a cell in a free slot; its output goes to a file beside its workdir."""
        slot = min(set(range(len(self.slots))) - self.running.keys())
        env = dict(os.environ)
        if self.slots[slot]:
            env["CUDA_VISIBLE_DEVICES"] = self.slots[slot]
        with self.starting, (self.out / f"{cell}.log").open("a") as log, self._cores(slot):
            command = [*self.command, f"--cell={cell}"]
            process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
            self.running[slot] = cell, process

    @contextlib.contextmanager
    def _cores(self, slot: int) -> Iterator[None]:
        """Processes started in this context keep to this slot's share of the cores."""
        if not hasattr(os, "sched_setaffinity"):  # macOS
            yield
            return
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, set(sorted(cores)[slot :: len(self.slots)]) or cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, cores)

    def ended(self) -> Iterator[tuple[Cell, int]]:
        """The cells that have ended since the last call, with their exit codes."""
        for slot, (cell, process) in list(self.running.items()):
            if process.poll() is not None:
                del self.running[slot]
                yield cell, process.returncode

    def stop(self) -> None:
        """Tells all cells to save and end, and waits for them; no other cell starts after that."""
        self.starting.acquire()
        running = [process for _, process in self.running.values()]
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def run_cells(study: Study, cells: list[Cell], pool: Pool) -> dict[Cell, int]:
    """Trains the cells that are not done; returns the exit codes of those that failed."""
    done = {Cell(row["run"], row["seed"]) for row in measured(study, pool.out)}
    waiting = [cell for cell in cells if cell not in done]
    failed: dict[Cell, int] = {}
    while waiting or pool.running:
        while waiting and len(pool.running) < len(pool.slots):
            pool.start(waiting.pop(0))
        for cell, code in pool.ended():
            if code:
                failed[cell] = code
            rows = write(study, pool.out)
            ending = f"ended with {code}" if code else "done"
            every = len(study.runs) * len(study.seeds)
            print(f"{cell}: {ending}; {len(rows)} of {every} cells are done")
        time.sleep(0.5)
    return failed


def asked(study: Study, only: str) -> list[Cell]:
    """The cells that --only names, as run or run-seed; all of them if it is empty.

    Raises:
      SetupError: it names none.
    """
    cells = [Cell(run, seed) for seed in study.seeds for run in study.runs]
    names = [name for name in only.split(",") if name]
    if unknown := [x for x in names if x not in {*study.runs, *map(str, cells)}]:
        raise SetupError(
            f"{first_few(unknown)}: no run or cell of {STUDY.value}; runs are "
            f"{', '.join(study.runs)}, with -<seed> of {', '.join(map(str, study.seeds))}."
        )
    return [cell for cell in cells if not names or {cell.run, str(cell)} & {*names}]


def reason(cell: Cell, code: int, out: epath.Path) -> str:
    """What is told of a cell that failed: its code, its log, and the end of that."""
    log = out / f"{cell}.log"
    # The last line, as the log may have errors of earlier attempts, too.
    said = log.read_bytes().decode(errors="replace").strip().rpartition("\n")[2]
    return f"{cell} with {code} ({log}). {said}".rstrip()


def main() -> None:
    study = cli.read(STUDY.value, lambda module: module.study(), "--study")
    # By name: the file's Study is that of supmim_jax.study, which as a command is __main__.
    if type(study).__name__ != Study.__name__:
        raise SetupError(
            f"--study {STUDY.value}: study() returns {type(study).__name__}, expected a Study of "
            f"supmim_jax.study."
        )
    if BASELINE.value:
        study = dataclasses.replace(study, baseline=BASELINE.value)
    out = epath.Path(OUT.value)
    if CELL.value:
        (cell,) = asked(study, CELL.value)
        train_cell(study, cell, out / str(cell))
        return
    cells = asked(study, ONLY.value)
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "supmim_jax.study", f"--study={STUDY.value}", f"--out={out}"]
    pool = Pool(command, out, GPUS.value or [""] * JOBS.value)
    multihost.finish_first(pool.stop)
    failed = run_cells(study, cells, pool)
    if rows := write(study, out):
        print(f"{study.question}\n\n{table(study, rows)}")
    if failed:
        told = first_few([reason(cell, code, out) for cell, code in failed.items()], "\n  ")
        code = multihost.EXIT_TRY_AGAIN if 1 in failed.values() else multihost.EXIT_SETUP
        cli.fail(f"Some cells ended early:\n  {told}\nThe same command goes on with them.", code)


if __name__ == "__main__":
    STUDY = flags.DEFINE_string("study", None, "A file as in configs/studies/.", required=True)
    OUT = storage.define("out", None, "Directory of the study, local.", required=True)
    ONLY = flags.DEFINE_string("only", "", "Some cells: <run> or <run>-<seed>, with commas.")
    BASELINE = flags.DEFINE_string("baseline", "", "Run to compare with; default: the study's own.")
    JOBS = flags.DEFINE_integer("jobs", 1, "Cells at once, on shares of the cores.", lower_bound=1)
    GPUS = flags.DEFINE_list("gpus", [], "Numbers of GPUs, for a cell at once on each.")
    CELL = flags.DEFINE_string("cell", "", "Trains one cell in this process.")
    cli.start(main)
