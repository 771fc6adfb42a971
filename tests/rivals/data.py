"""The input pipeline beside tf.data: images per second and per core, stages, exactness."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path

import cv2
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding

from rivals import photographs, reference, tfdata_reference
from supmim_jax import sharding, storage
from supmim_jax.config import Config, DataConfig, MeshConfig, SupervisedConfig
from supmim_jax.data import decode, transforms
from supmim_jax.data import source as source_module
from supmim_jax.data.loader import Dataset
from supmim_jax.data.transforms import GEOMETRY, TrainExample, generator
from supmim_jax.errors import SetupError

PACKAGES = ("jax", "grain", "array-record", "opencv-python-headless", "tensorflow-datasets")
OURS = "supmim_jax"
SIZE = 224  # pixels of a training image
HALVES_DIFFER = 4.0  # of 255, in the mean: what aliasing and truncation may make


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure."""

    images: int = 512
    seed: int = 0
    augment: str = "none"
    resize: str = "linear"
    workers: int = 0
    threads: int = 2
    batch: int = 64
    rounds: int = 5
    batches: int = 80  # of the whole pipeline, after the warm-up
    rival: bool = True

    @property
    def share(self) -> int:
        """Batches of the whole pipeline in a round."""
        return max(1, self.batches // self.rounds)


def command() -> Callable[[], None]:
    """Defines the flags of this bench; what it returns prints a table and the result as JSON."""
    number, choice = flags.DEFINE_integer, flags.DEFINE_enum
    augments, resizes = ["none", "rand_augment", "three_augment"], ["linear", "area"]
    given = {
        "images": number("images", 512, "Photographs to make.", lower_bound=1),
        "seed": number("seed", 0, "Of the photographs and of the crops.", lower_bound=0),
        "augment": choice("augment", "none", augments, "After crop and flip."),
        "resize": choice("resize", "linear", resizes, "config.data.resize; tf.data's is linear."),
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
        plan = Plan(**{name: flag.value for name, flag in given.items()})
        with prepared(directory.value, keep.value) as where:
            result = measure(plan, where)
        print(report(result))
        print(json.dumps(result))

    return run


def prepared(directory: str, keep: bool) -> contextlib.AbstractContextManager[str]:
    """A directory for the data set: the one given, or one that is removed afterwards.

    Raises:
      SetupError: the photographs are to be kept, but there is no name to keep them under.
    """
    if bool(directory) != keep:
        raise SetupError("--data_dir and --keep go together: what is kept or reused has a place.")
    return contextlib.nullcontext(directory) if keep else tempfile.TemporaryDirectory()


def measure(plan: Plan, directory: str) -> dict:
    """All results as a dict that JSON can hold; `report` says what they mean.

    Raises:
      SetupError: the data set cannot be made, or TensorFlow is missing.
    """
    images = photographs.prepare(directory, plan.images, plan.seed)
    cfg = config(plan, directory, images)
    source = source_module.Source(cfg.data).records(cfg.data.train_split)
    sizes = [len(source[i]["image"]) / 1e3 for i in range(images)]
    result = {
        "plan": dataclasses.asdict(plan),
        "images": images,
        "kb": {"mean": np.mean(sizes), "min": min(sizes), "max": max(sizes)},
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    # First: when a pipeline is closed, its threads still finish what they have begun.
    seconds = stage_seconds(source, cfg, sharding.make_mesh(MeshConfig()), images)
    result["stages_us"] = {name: 1e6 * spent for name, spent in seconds.items()}
    result["quality"] = quality(source, cfg, max(64, min(images, 256)))
    return result | compared(source, cfg, plan)


def config(plan: Plan, directory: str, images: int) -> Config:
    """A supervised run on the photographs with as many steps as the longest measurement takes."""
    batch = min(plan.batch, images)
    read = batch * (plan.batches + 8 * max(1, plan.workers)) * 2
    data = DataConfig(
        name="photographs", data_dir=directory, train_examples=images,
        num_classes=photographs.CLASSES, image_size=SIZE, channels=3, crop="inception",
        augment=plan.augment, resize=plan.resize, eval_resize=256, eval_split="train",
        workers=plan.workers, threads=plan.threads,
    )  # fmt: skip
    epochs = (read + batch) / images
    return Config(
        seed=plan.seed, batch_size=batch, epochs=epochs, data=data, objective=SupervisedConfig()
    )


# --- images per second and per core


def compared(source: source_module.Records, cfg: Config, plan: Plan) -> dict:
    """Ours and tf.data on one core by turns, then whole pipelines on several, one after the other.

    Both make the same crops of the same records, as many as fill whole batches.
    """
    batches = len(source) // cfg.batch_size
    transformed(source, cfg, batches)  # opens files, fills caches
    if not plan.rival or plan.augment != "none":
        own = [transformed(source, cfg, batches) for _ in range(plan.rounds)]
        return {"one_core": summed({OURS: own}), "host": summed({OURS: windows(cfg, plan)})}
    if util.find_spec("tensorflow") is None:
        raise SetupError("TensorFlow is not installed, so nothing to compare with: --norival.")
    cores = max(1, plan.workers or plan.threads)
    rows = boxes(cfg, batches * cfg.batch_size)
    given = ([source.raw[i] for i in range(len(rows))], rows, SIZE, cfg.batch_size)
    names = list(tfdata_reference.VARIANTS)
    with tfdata_reference.Rival(*given, cores=1) as rival:
        version = rival.version
        for name in names:
            rival.measure(name, batches)  # builds the graph's functions
        one = {name: [] for name in (OURS, *names)}
        for _ in range(plan.rounds):
            one[OURS].append(transformed(source, cfg, batches))
            for name in names:
                one[name].append(rival.measure(name, batches))
    check_same(one)
    name = "tf.data"
    with tfdata_reference.Rival(*given, cores=cores) as rival:
        host = {OURS: windows(cfg, plan)}
        rival.measure(name, 4 * cores)  # until its buffers are as full as they will be
        host[name] = [rival.measure(name, plan.share) for _ in range(plan.rounds)]
    return {"one_core": summed(one), "host": summed(host), "tensorflow": version, "cores": cores}


def check_same(found: dict[str, list[dict]]) -> None:
    """Whether the images of the last batch are the same, as far as means of their halves tell.

    Raises:
      RuntimeError: they are not, so that the times are of different work.
    """
    ours = np.array(found[OURS][0]["halves"])
    for name, rounds in found.items():
        apart = np.abs(np.array(rounds[0]["halves"]) - ours).mean()
        if apart > HALVES_DIFFER:
            raise RuntimeError(f"The images of {name} differ from ours by {apart:.1f} of 255.")


def summed(found: dict[str, list[dict]]) -> dict[str, dict]:
    """Seconds per 1000 images, images per second, and ours over theirs: median, least and most.

    Each round's ratio is of CPU seconds, theirs over ours in the same round, so that other
    processes' noise cancels; above 1 ours is faster.
    """
    ours, result = found[OURS], {}
    for name, rounds in found.items():
        cpu, wall = (
            float(np.median([1000 * r[clock] / r["images"] for r in rounds]))
            for clock in ("cpu", "wall")
        )
        ratio = [(b["cpu"] / b["images"]) / (a["cpu"] / a["images"]) for a, b in zip(ours, rounds)]
        result[name] = {
            "cpu_s_per_1000": cpu, "wall_s_per_1000": wall,
            "images_per_cpu_s": 1000 / cpu, "images_per_s": 1000 / wall,
            "ratio": float(np.median(ratio)), "ratio_min": min(ratio), "ratio_max": max(ratio),
        }  # fmt: skip
    return result


def transformed(source: source_module.Records, cfg: Config, batches: int) -> dict[str, float]:
    """Seconds of the first records through the transforms, stacked in batches: one thread."""
    example = TrainExample(cfg.data, cfg.seed, 1)
    wall, cpu = time.perf_counter(), tfdata_reference.cpu_seconds()
    for first in range(0, batches * cfg.batch_size, cfg.batch_size):
        made = [example((0, i, source[i])) for i in range(first, first + cfg.batch_size)]
        arrays = {name: np.stack([x[name] for x in made]) for name in made[0]}
    wall, cpu = time.perf_counter() - wall, tfdata_reference.cpu_seconds() - cpu
    halves = tfdata_reference.halves(arrays["image"])
    return {"wall": wall, "cpu": cpu, "images": batches * cfg.batch_size, "halves": halves}


def boxes(cfg: Config, count: int) -> np.ndarray:
    """int32 count x 5: the crop that `transformed` takes of each record, and if it is mirrored."""
    rows = []
    for i in range(count):
        rng = generator(cfg.seed, 0, i, GEOMETRY)
        crop = transforms.draw_crop(photographs.HEIGHT, photographs.WIDTH, cfg.data, rng)
        rows.append((*crop.box, crop.mirrored))
    return np.array(rows, np.int32)


def windows(cfg: Config, plan: Plan) -> list[dict]:
    """`rounds` windows of the whole pipeline after a warm-up: seconds of wall clock and of CPU.

    Whoever takes the batches does nothing else, so wall clock is all waiting for the next one. CPU
    is that of this process and of its workers.
    """
    found = []
    with contextlib.closing(Dataset.open(cfg).train(sharding.make_mesh(MeshConfig()))) as stream:
        for _ in range(4 * max(1, plan.workers)):  # each worker has its buffers full, as later
            next(stream)
        pids = [process.pid for process in multiprocessing.active_children()]

        def spent() -> float:
            return tfdata_reference.cpu_seconds() + sum(map(cpu_seconds_of, pids))

        for _ in range(plan.rounds):
            wall, cpu = time.perf_counter(), spent()
            for _ in range(plan.share):
                jax.block_until_ready(next(stream).views)
            cpu = spent() - cpu
            wall = time.perf_counter() - wall
            found.append({"wall": wall, "cpu": cpu, "images": plan.share * cfg.batch_size})
    return found


def cpu_seconds_of(pid: int) -> float:
    """User and system time of all threads of a process, in steps of the kernel's clock (10 ms).

    Raises:
      SetupError: this system has no /proc.
    """
    if not Path("/proc/self/stat").exists():
        raise SetupError("CPU time is read from /proc, which this system lacks: measure on Linux.")
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- stages and exactness

STAGES = (
    *("read the record", "parse tf.Example", "draw the box", "decode JPEG", "resize", "flip"),
    *("augment", "batch", "to the device"),
)


def stage_seconds(
    source: source_module.Records, cfg: Config, mesh: Mesh, images: int
) -> dict[str, float]:
    """CPU seconds per image of each of STAGES, by the functions that the pipeline is made of.

    "augment" is all that follows the crop: with RandAugment the operations that move pixels, too.
    """
    spent, to = defaultdict(float), NamedSharding(mesh, sharding.BATCH)
    _example(source, 0, cfg, defaultdict(float))  # opens files and libraries
    jax.block_until_ready(jax.device_put(np.zeros(cfg.batch_size), to))
    count = max(1, images // cfg.batch_size) * cfg.batch_size
    for first in range(0, count, cfg.batch_size):
        ids = range(first, first + cfg.batch_size)
        batch = [_example(source, i % len(source), cfg, spent) for i in ids]
        start = time.thread_time()
        arrays = {name: np.stack([x[name] for x in batch]) for name in batch[0]}
        spent["batch"] += time.thread_time() - start
        start = time.process_time()  # JAX copies in threads of its own
        jax.block_until_ready(jax.device_put(arrays, to))
        spent["to the device"] += time.process_time() - start
    return {stage: spent[stage] / count for stage in STAGES}


def _example(source: source_module.Records, i: int, cfg: Config, spent: dict[str, float]) -> dict:
    """What TrainExample makes of record i, with the time of its parts added to `spent`."""
    times = [time.thread_time()]

    def tick() -> None:
        times.append(time.thread_time())

    source.raw[i]
    tick()
    record = source[i]
    tick()
    rng = generator(cfg.seed, 0, i, GEOMETRY)
    shape = photographs.HEIGHT, photographs.WIDTH
    whole = decode.jpeg_size(record["image"]) is None
    crop = transforms.draw_crop(*shape, cfg.data, rng)
    tick()
    if whole:
        part = crop.box.of(decode.decode_image(record, cfg.data, i))
    else:
        part = decode.jpeg_region(record["image"], crop.box, shape)
    tick()
    view = transforms.finished(part, crop._replace(mirrored=False), cfg.data)
    tick()
    view = cv2.flip(view, 1) if crop.mirrored else view
    tick()
    view, layers = transforms.moved(view, cfg.data, rng)
    view = transforms.coloured(view, layers, cfg.data, cfg.seed, 0, i)
    tick()
    parts = np.diff(times)
    parts[1] -= parts[0]  # the second read the record again
    for stage, seconds in zip(STAGES, parts):
        spent[stage] += float(seconds)
    return transforms.packed(view, record["label"], i, 1.0)


def quality(source: source_module.Records, cfg: Config, images: int) -> dict[str, float]:
    """PSNR in dB of our crops, before any augmentation, against the reference of the same boxes.

    The reference is the whole image, decoded by OpenCV with the accurate integer DCT, then resized
    in float64.
    """
    plain = dataclasses.replace(cfg.data, augment="none")
    example, found, size = TrainExample(plain, cfg.seed, 1), [], cfg.data.image_size
    for i in range(images):
        record = source[i % len(source)]
        whole = cv2.imdecode(np.frombuffer(record["image"], np.uint8), cv2.IMREAD_COLOR_RGB)
        crop = transforms.draw_crop(*whole.shape[:2], cfg.data, generator(cfg.seed, 0, i, GEOMETRY))
        expected = reference.resized(crop.box.of(whole), size, size, cfg.data.resize)
        ((ours, _),) = example.targets(0, i, record)
        found.append(reference.psnr(ours, expected[:, ::-1] if crop.mirrored else expected))
    return {
        "images": images,
        "min_db": min(found),
        "median_db": float(np.median(found)),
        "mean_db": float(np.mean(found)),
    }


# --- what is printed


def report(result: dict) -> str:
    """Tables in Markdown: ours and tf.data, where the CPU time of an image goes, exactness."""
    kb, plan, psnr = result["kb"], result["plan"], result["quality"]
    workers, threads = plan["workers"], plan["threads"]
    lines = [
        f"{result['images']} JPEGs of 500x375, quality 95, 4:2:0, {kb['mean']:.1f} kB in the mean "
        f"({kb['min']:.0f} to {kb['max']:.0f}); to 224 px, augment {plan['augment']}; "
        f"{result['cpus']} CPUs, load {result['load']:.1f}; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    ]
    pipeline = f"whole pipeline, {f'{workers} processes' if workers else f'{threads} threads'}"
    columns = "images/s of wall clock | CPU s per 1000 images | CPU time / ours (range of rounds)"
    for title, rows in (("one thread", result["one_core"]), (pipeline, result["host"])):
        lines += ["", f"| {title} | {columns} |", "|---|---|---|---|"]
        for name, row in rows.items():
            ratio = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
            speed = f"{row['images_per_s']:.0f} | {row['cpu_s_per_1000']:.2f}"
            lines.append(f"| {name} | {speed} | {ratio} |")
    total = sum(result["stages_us"].values())
    lines += ["", "| stage | us per image | share |", "|---|---|---|"]
    lines += [f"| {n} | {us:.0f} | {us / total:.1%} |" for n, us in result["stages_us"].items()]
    lines += [
        f"| all | {total:.0f} | 100 % |",
        "",
        f"PSNR against float64 over {psnr['images']} boxes: least {psnr['min_db']:.1f} dB, median "
        f"{psnr['median_db']:.1f}, mean {psnr['mean_db']:.1f}.",
    ]
    return "\n".join(lines)
