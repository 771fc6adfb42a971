"""supmim_jax.train with a fault in it: python tests/faulty.py --config ... --workdir ...

The environment variable FAULT holds {"log": file, "slow": seconds, "signal": n, "at": point,
"count": n, "delay": seconds, "until": step, "group": true, "nan": n}. The process is sent the
signal where `point` is reached for the `count`th time (with "hang" for n it hangs there), `delay`
seconds later if that is given, with `group` its children too, and in any case once step `until` is
done. The `nan`th batch that is taken gives NaN. `log` gets a line for each step that begins, with
the ids of its batch, and for each that is done; every step takes `slow` seconds longer.
"""

import dataclasses
import json
import os
import runpy
import threading
import time

import numpy as np
from orbax.checkpoint._src.path import atomicity

from supmim_jax import checkpoint, storage, workdir
from supmim_jax.data import fractals, loader
from supmim_jax.metrics import MetricsWriter
from supmim_jax.models import kmeans
from supmim_jax.watchdog import Watchdog

FAULT = json.loads(os.environ["FAULT"])
reached = {}


def send() -> None:
    log({"sent": time.monotonic()})
    if FAULT["signal"] == "hang":
        time.sleep(9999)
    (os.killpg if FAULT.get("group") else os.kill)(os.getpid(), FAULT["signal"])


def at(point: str) -> bool:
    """Whether the fault is due here."""
    reached[point] = reached.get(point, 0) + 1
    return FAULT.get("at") == point and reached[point] == FAULT["count"]


def fault(point: str) -> None:
    if at(point):
        threading.Timer(FAULT["delay"], send).start() if FAULT.get("delay") else send()


def log(line: dict) -> None:
    with open(FAULT["log"], "a") as file:
        file.write(json.dumps(line) + "\n")


def before(owner, name: str, point: str) -> None:
    """The fault comes when the function is called."""
    function = getattr(owner, name)

    def faulty(*args, **kwargs):
        fault(point)
        return function(*args, **kwargs)

    setattr(owner, name, faulty)


def batches(function):
    def following(data):
        fault("batch")
        batch = function(data)
        reached["nan"] = reached.get("nan", 0) + 1
        if reached["nan"] == FAULT.get("nan"):
            batch = dataclasses.replace(batch, weight=batch.weight * float("nan"))
        ids = [np.asarray(shard.data) for shard in batch.id.addressable_shards]
        log({"ids": np.concatenate(ids).tolist()})
        return batch

    return following


def beat(function):
    def beating(watch, step):
        function(watch, step)
        log({"done": step})
        time.sleep(FAULT.get("slow", 0))
        fault("step")
        if step == FAULT.get("until"):
            send()

    return beating


def write(function):
    def writing(writer, step, values):
        if not at("half a line"):
            function(writer, step, values)
        elif storage.is_local(writer.path):
            line = json.dumps({"step": step, **values}) + "\n"
            with writer.path.open("a") as file:
                file.write(line[:20])
                file.flush()
                send()
                file.write(line[20:])
        else:  # an object has no halves
            function(writer, step, values)
            send()

    return writing


def evaluation(function):
    def evaluating(*args):
        for batch in function(*args):
            time.sleep(FAULT.get("slow", 0))
            fault("evaluation")
            yield batch

    return evaluating


def commit(function):
    async def committing(*args, **kwargs):
        fault("before commit")
        await function(*args, **kwargs)
        fault("after commit")

    return committing


def main() -> None:
    loader.Training.__next__ = batches(loader.Training.__next__)
    Watchdog.beat = beat(Watchdog.beat)
    MetricsWriter.write = write(MetricsWriter.write)
    loader.Dataset.eval = evaluation(loader.Dataset.eval)
    for temporary in (atomicity.AtomicRenameTemporaryPath, atomicity.CommitFileTemporaryPath):
        temporary.finalize = commit(temporary.finalize)
    before(checkpoint.Checkpoints, "save", "save")
    before(checkpoint.Checkpoint, "restore_state", "restore")
    before(fractals, "render", "render")
    before(kmeans, "fit", "fit")
    before(workdir.Workdir, "claimed", "make")
    before(Watchdog, "__enter__", "loop")
    runpy.run_module("supmim_jax.train", run_name="__main__")


if __name__ == "__main__":
    main()
