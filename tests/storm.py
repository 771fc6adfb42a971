"""Kills a run again and again, and compares it with one that was left alone.

usage: python tests/storm.py KILL|TERM [--times 100] [--seed 0] [--directory DIR] [--bucket]

The run is configs/debug.py on part of its images. Each attempt is sent the signal at a random time
or at a random point of those in tests/faulty.py, and always before it has done more than a small
share of the steps. After the last one the run goes on to its end. Prints a table; exit code 1 if
anything is not as it must be. With --bucket the run is in one (tests/gcs.py), its twin is not.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gcs
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from supmim_jax import checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent
POINTS = {  # and how often one is reached at least, in an attempt that does a few steps
    "make": 1,
    "loop": 1,
    "restore": 1,
    "batch": 6,
    "step": 6,
    "save": 3,
    "before commit": 6,
    "after commit": 6,
    "half a line": 3,
    "evaluation": 4,
}
LATE = ["save", "before commit", "after commit", "half a line", "evaluation"]  # drawn more often
FIRST = [("render", 1), ("render", 3), ("fit", 1)]  # the first attempts: no data, no codebook yet
EXAMPLES, BATCH = 60, 12  # five steps are an epoch
EVERY = 3  # steps between checkpoints
SHARE = 12  # steps that an attempt does at most
WITHIN = 30.0  # seconds to end in, after SIGTERM


class Wrong(Exception):
    """The run is not as it must be."""


class Run:
    """A run whose attempts are disturbed, and what they were seen to do."""

    def __init__(self, workdir: epath.Path, data_dir: str, epochs: int, log: Path):
        self.workdir, self.log = workdir, log
        self.data_dir, self.epochs = data_dir, epochs
        self.steps = epochs * EXAMPLES // BATCH
        overrides = {
            "data.data_dir": data_dir,
            "data.train_split": f"train[:{EXAMPLES}]",
            "data.train_examples": EXAMPLES,
            "data.eval_split": "validation[:240]",
            "batch_size": BATCH,
            "epochs": epochs,
            "model.depth": 1,
            "objective.target.fit_images": EXAMPLES,
            "eval.batch_size": 60,
            "eval.every": 4,
            "log.every": 2,
            "checkpoint.every": EVERY,
        }
        self.command = [sys.executable, "tests/faulty.py", "--config=configs/debug.py"]
        self.command += [f"--workdir={workdir}"]
        self.command += [f"--config.{name}={value}" for name, value in overrides.items()]

    def another(self, workdir: epath.Path, log: Path) -> "Run":
        """The same run elsewhere, which makes its own data."""
        return Run(workdir, f"{workdir}_data", self.epochs, log)

    def start(self, fault: dict) -> subprocess.Popen:
        """An attempt; its log begins with where it must go on."""
        self.note({"saved": self.saved()})
        env = os.environ | {"FAULT": json.dumps(fault | {"log": str(self.log)})}
        env |= {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(self.command, cwd=REPOSITORY, env=env, **pipes)

    def finish(self) -> None:
        """Goes on to the end, undisturbed."""
        process = self.start({})
        out, _ = process.communicate()
        if process.returncode or not (self.workdir / "results.json").exists():
            raise Wrong(f"Left alone, it ended with {process.returncode}:\n{out}")

    def saved(self) -> int:
        """The newest complete checkpoint."""
        return max(checkpoint.steps(self.workdir), default=0)

    def note(self, line: dict) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def attempts(self) -> list[list[dict]]:
        """The log's lines, by attempt."""
        found = []
        for line in map(json.loads, self.log.read_text().splitlines()):
            found.append([]) if "saved" in line else None
            found[-1].append(line)
        return found

    def ids(self) -> dict[int, list[int]]:
        """Of each step; every attempt that did a step, or began it, must have had the same."""
        found = {}
        for first, *lines in self.attempts():
            batches = [x["ids"] for x in lines if "ids" in x]
            done = [x["done"] for x in lines if "done" in x]
            for step, ids in enumerate(batches, first["saved"] + 1):
                if found.setdefault(step, ids) != ids:
                    raise Wrong(f"Step {step} had other images when it was done again.")
            if done != list(range(first["saved"] + 1, first["saved"] + 1 + len(done))):
                raise Wrong(f"Saved was step {first['saved']}; then came steps {done}.")
        return found

    def state(self) -> dict[str, np.ndarray]:
        """All arrays after the last step."""
        directory = self.workdir / "checkpoints" / str(self.steps) / "state"
        leaves = jax.tree_util.tree_leaves_with_path(ocp.PyTreeCheckpointer().restore(directory))
        return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}

    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl, but for what is of the machine."""
        lines = (self.workdir / "metrics.jsonl").read_text().splitlines()
        timing = ("images_per_second", "data_wait")
        return [{k: v for k, v in json.loads(x).items() if k not in timing} for x in lines]


def disturb(
    run: Run, number: int, until: int, takes: float, draw: random.Random, at: tuple | None = None
) -> dict:
    """One attempt, ended by the signal after step `until` at the latest, in about `takes` seconds.

    It comes at a point and count, which are drawn unless `at` gives them, or at a random time.
    """
    fault, wait = {"signal": int(number), "slow": 0.02, "until": until}, 300.0
    if at:
        fault["at"], fault["count"] = at
    elif draw.random() < 0.5:
        wait = draw.uniform(0, 1.5 * takes)
    else:
        fault["at"] = draw.choice([*POINTS, *LATE, *LATE])
        fault["count"] = draw.randint(1, POINTS[fault["at"]])
        if fault["at"] == "save" and draw.random() < 0.7:
            fault["delay"] = draw.uniform(0, 0.15)
    before, start, process = run.saved(), time.monotonic(), run.start(fault)
    try:
        out, _ = process.communicate(timeout=wait)
        point = fault.get("at", "a step")
    except subprocess.TimeoutExpired:
        point, sent = "a time", time.monotonic()
        process.send_signal(number)
        out, _ = process.communicate()
    over = time.monotonic()
    lines = run.attempts()[-1]
    sent = next((x["sent"] for x in lines if "sent" in x), sent if point == "a time" else over)
    done = max((x["done"] for x in lines if "done" in x), default=before)
    if point == fault.get("at") and done >= until:
        point = "a step"  # the other was not reached before
    found = {"point": point, "code": process.returncode, "took": over - start}
    found |= {"ended_in": over - sent, "done": done, "saved": run.saved()}
    check_attempt(found, number, out)
    return found


def check_attempt(found: dict, number: int, out: str) -> None:
    """Raises Wrong unless the attempt ended as it must."""
    codes = (-signal.SIGKILL,) if number == signal.SIGKILL else (143, -signal.SIGTERM)
    if found["code"] not in codes:
        raise Wrong(f"{found}\n{out}")
    if found["done"] - found["saved"] > 2 * EVERY:  # one save may have been under way
        raise Wrong(f"More was lost than since the last save: {found}\n{out}")
    if number == signal.SIGTERM:
        if found["saved"] != found["done"]:
            raise Wrong(f"Steps were lost: {found}\n{out}")
        if found["ended_in"] > WITHIN:
            raise Wrong(f"It took too long to end: {found}\n{out}")


def check_run(run: Run, left_alone: Run) -> None:
    """Raises Wrong unless the run is the other one, to the bit."""
    ids = run.ids()
    if ids != left_alone.ids() or sorted(ids) != list(range(1, run.steps + 1)):
        raise Wrong("The steps had other images.")
    per_epoch = EXAMPLES // BATCH
    for epoch in range(run.steps // per_epoch):
        steps = range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)
        if sorted(x for step in steps for x in ids[step]) != list(range(EXAMPLES)):
            raise Wrong(f"Epoch {epoch} did not have every image once.")
    here, there = run.state(), left_alone.state()
    other = [n for n in there if n not in here or here[n].tobytes() != there[n].tobytes()]
    if other or here.keys() != there.keys():
        raise Wrong(f"These arrays differ: {other}")
    here, there = run.metrics(), left_alone.metrics()
    if here != there:
        raise Wrong(f"metrics.jsonl differs: {[x for x in here if x not in there]}")


def undisturbed(times: int, directory: Path, data_dir: str) -> Run:
    """A whole run, long enough to be disturbed so often."""
    epochs = -(-times * SHARE * BATCH // EXAMPLES)
    run = Run(epath.Path(directory / "left_alone"), data_dir, epochs, directory / "left_alone.log")
    run.finish()
    return run


def storm(
    number: int, times: int, seed: int, run: Run, left_alone: Run, first: list[tuple[str, int]]
) -> list[dict]:
    """The attempts of `run` that was disturbed so often, and then ended like `left_alone`.

    The first ones come to these points, for the last of so many times.

    Raises:
      Wrong: an attempt or the run is not as it must be.
    """
    draw, found, takes = random.Random(seed), [], 15.0
    for i in range(times):
        at, share = first[i] if i < len(first) else None, draw.randint(1, SHARE)
        until = run.saved() + (SHARE if at else share)
        found.append(disturb(run, number, until, takes, draw, at))
        if found[-1]["point"] in ("a step", "step"):
            takes = 0.8 * takes + 0.2 * 1.2 * found[-1]["took"]
        print(i + 1, json.dumps(found[-1]), flush=True)
    run.finish()
    check_run(run, left_alone)
    return found


def report(found: list[dict], steps: int) -> None:
    print("\n| signal came at | times | steps done, not saved: most | seconds to end: most |")
    print("|---|---:|---:|---:|")
    for point in ["a time", "a step", *dict(FIRST), *POINTS]:
        rows = [x for x in found if x["point"] == point]
        if rows:
            lost = max(x["done"] - x["saved"] for x in rows)
            print(f"| {point} | {len(rows)} | {lost} | {max(x['ended_in'] for x in rows):.1f} |")
    codes = collections.Counter(x["code"] for x in found)
    print(f"\n{len(found)} attempts, exit codes {dict(codes)}, {steps} steps; all as it must be.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("signal", choices=["KILL", "TERM"])
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--bucket", action="store_true")
    given = parser.parse_args()
    directory = given.directory or Path(tempfile.mkdtemp(prefix="storm_"))
    directory.mkdir(parents=True, exist_ok=True)
    number, data_dir = signal.Signals["SIG" + given.signal], str(directory / "data")
    print(f"{given.times} times {number.name}, seed {given.seed}, in {directory}", flush=True)
    with gcs.server() if given.bucket else contextlib.nullcontext({}) as bucket:
        os.environ |= bucket
        try:
            left_alone = undisturbed(given.times, directory, data_dir)
            place = f"gs://{gcs.BUCKET}" if given.bucket else directory
            run = left_alone.another(epath.Path(place) / "run", directory / "run.log")
            first = FIRST if given.times > 9 else []
            found = storm(number, given.times, given.seed, run, left_alone, first)
        except Wrong as wrong:
            sys.exit(f"wrong: {wrong}")
    report(found, run.steps)


if __name__ == "__main__":
    main()
