"""Where the time of one training image goes, and how exact it is: one thread, stage by stage."""

import dataclasses
import time
from collections import defaultdict

import cv2
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from rivals import photographs, reference
from supmim_jax.config import Config
from supmim_jax.data import crops, decode, jpeg, transforms
from supmim_jax.data import source as source_module
from supmim_jax.data.transforms import GEOMETRY, TrainExample, generator
from supmim_jax.sharding import BATCH

STAGES = (
    "read the record",
    "parse tf.Example",
    "draw the box",
    "decode JPEG",
    "resize",
    "flip",
    "augment",
    "batch",
    "to the device",
)


def stage_seconds(
    source: source_module.Records, cfg: Config, mesh: Mesh, images: int
) -> dict[str, float]:
    """CPU seconds per image of each of STAGES, by the functions that the pipeline is made of.

    "augment" is all that follows the crop: with RandAugment the operations that move pixels, too.
    """
    spent = defaultdict(float)
    batch, sharding = [], NamedSharding(mesh, BATCH)
    _example(source, 0, cfg, defaultdict(float))  # opens files and libraries
    jax.block_until_ready(jax.device_put(np.zeros(cfg.batch_size), sharding))
    rounds = max(1, images // cfg.batch_size)
    for i in range(rounds * cfg.batch_size):
        batch.append(_example(source, i % len(source), cfg, spent))
        if len(batch) == cfg.batch_size:
            start = time.thread_time()
            arrays = {name: np.stack([x[name] for x in batch]) for name in batch[0]}
            spent["batch"] += time.thread_time() - start
            start = time.process_time()  # JAX copies in threads of its own
            jax.block_until_ready(jax.device_put(arrays, sharding))
            spent["to the device"] += time.process_time() - start
            batch = []
    return {stage: spent[stage] / (rounds * cfg.batch_size) for stage in STAGES}


def _example(source: source_module.Records, i: int, cfg: Config, spent: dict[str, float]) -> dict:
    """What TrainExample makes of record i, with the time of its parts added to `spent`."""
    clock = time.thread_time
    t0 = clock()
    source.raw[i]
    t1 = clock()
    record = source[i]
    t2 = clock()
    rng = generator(cfg.seed, 0, i, GEOMETRY)
    shape = photographs.HEIGHT, photographs.WIDTH
    whole = jpeg.size(record["image"]) is None
    crop = crops.draw_crop(*shape, cfg.data, rng)
    t3 = clock()
    if whole:
        part = crop.box.of(decode.decode_image(record, cfg.data, i))
    else:
        part = jpeg.region(record["image"], crop.box, shape)
    t4 = clock()
    view = crops.finished(part, crop._replace(mirrored=False), cfg.data)
    t5 = clock()
    view = cv2.flip(view, 1) if crop.mirrored else view
    t6 = clock()
    view, layers = transforms.moved(view, cfg.data, rng)
    view = transforms.coloured(view, layers, cfg.data, cfg.seed, 0, i)
    t7 = clock()
    read, parsed = t1 - t0, (t2 - t1) - (t1 - t0)
    parts = (read, parsed, t3 - t2, t4 - t3, t5 - t4, t6 - t5, t7 - t6)
    for stage, seconds in zip(STAGES, parts):
        spent[stage] += seconds
    return transforms.packed(view, record["label"], i, 1.0)


def quality(source: source_module.Records, cfg: Config, images: int) -> dict[str, float]:
    """PSNR in dB of our crops, before any augmentation, against the reference of the same boxes.

    The reference is the whole image, decoded by OpenCV with the accurate integer DCT, then resized
    in float64.
    """
    plain = dataclasses.replace(cfg.data, augment="none")
    example, found = TrainExample(plain, cfg.seed, 1), []
    for i in range(images):
        record = source[i % len(source)]
        encoded = np.frombuffer(record["image"], np.uint8)
        whole = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)
        rng = generator(cfg.seed, 0, i, GEOMETRY)
        crop = crops.draw_crop(*whole.shape[:2], cfg.data, rng)
        size = cfg.data.image_size
        expected = reference.resized(crop.box.of(whole), size, size, cfg.data.resize)
        ((ours, _),) = example.targets(0, i, record)
        found.append(reference.psnr(ours, expected[:, ::-1] if crop.mirrored else expected))
    return {
        "images": images,
        "min_db": min(found),
        "median_db": float(np.median(found)),
        "mean_db": float(np.mean(found)),
    }
