"""The input pipeline beside tf.data: images per second and per core, stages, exactness."""

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata

import numpy as np
from absl import flags

from rivals import data_plan, data_rates, data_stages, photographs
from rivals.data_report import report
from supmim_jax import sharding, storage
from supmim_jax.config import MeshConfig
from supmim_jax.data import source as source_module
from supmim_jax.errors import SetupError

PACKAGES = ("jax", "grain", "array-record", "opencv-python-headless", "tensorflow-datasets")


def command() -> Callable[[], None]:
    """Defines the flags of this bench; what it returns prints a table and the result as JSON."""
    number = flags.DEFINE_integer
    given = {
        "images": number("images", 512, "Photographs to make.", lower_bound=1),
        "seed": number("seed", 0, "Of the photographs and of the crops.", lower_bound=0),
        "augment": flags.DEFINE_enum(
            "augment", "none", ["none", "rand_augment", "three_augment"], "After crop and flip."
        ),
        "resize": flags.DEFINE_enum(
            "resize", "linear", ["linear", "area"], "config.data.resize; linear is as tf.data's."
        ),
        "workers": number("workers", 0, "Processes of the whole pipeline.", lower_bound=0),
        "threads": number("threads", 2, "Its threads, if there are no processes.", lower_bound=1),
        "batch": number("batch", 64, "Images of a batch.", lower_bound=1),
        "rounds": number("rounds", 5, "Turns of ours and of tf.data.", lower_bound=1),
        "batches": number("batches", 80, "Batches of the whole pipeline.", lower_bound=1),
        "rival": flags.DEFINE_bool("rival", True, "Compare with tf.data, in another process."),
    }
    directory = storage.define("data_dir", "", "Where the photographs are or will be made.")
    keep = flags.DEFINE_bool("keep", False, "Leave the photographs in --data_dir.")

    def run() -> None:
        plan = data_plan.Plan(**{name: flag.value for name, flag in given.items()})
        with prepared(directory.value, keep.value) as where:
            result = measure(plan, where)
        print(report(result))
        print(json.dumps(result))

    return run


@contextlib.contextmanager
def prepared(directory: str, keep: bool) -> Iterator[str]:
    """A directory for the data set: the one given, or one that is removed afterwards.

    Raises:
      SetupError: the photographs are to be kept, but there is no name to keep them under.
    """
    if bool(directory) != keep:
        raise SetupError("--data_dir and --keep go together: what is kept or reused has a place.")
    if directory:
        yield directory
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield temporary


def measure(plan: data_plan.Plan, directory: str) -> dict:
    """All results as a dict that JSON can hold; `report` says what they mean.

    Raises:
      SetupError: the data set cannot be made, or TensorFlow is missing.
    """
    images = photographs.prepare(directory, plan.images, plan.seed)
    cfg = data_plan.config(plan, directory, images)
    source = source_module.open_source(cfg.data, cfg.data.train_split)
    sizes = [len(source[i]["image"]) / 1e3 for i in range(images)]
    result = {
        "plan": dataclasses.asdict(plan),
        "images": images,
        "kb": {"mean": np.mean(sizes), "min": min(sizes), "max": max(sizes)},
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    mesh = sharding.make_mesh(MeshConfig())
    # First: when a pipeline is closed, its threads still finish what they have begun.
    seconds = data_stages.stage_seconds(source, cfg, mesh, images)
    result["stages_us"] = {name: 1e6 * spent for name, spent in seconds.items()}
    result["quality"] = data_stages.quality(source, cfg, max(64, min(images, 256)))
    return result | data_rates.compared(source, cfg, plan)
