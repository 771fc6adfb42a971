"""What a token cache costs: bytes per view of an image, and reading beside decoding a JPEG."""

import tempfile
import time
from collections.abc import Callable

import numpy as np
from absl import flags
from etils import epath

from rivals import photographs
from supmim_jax.config import DataConfig, VQGANConfig
from supmim_jax.config.configdict import section
from supmim_jax.data import source, token_cache, transforms

IMAGENET = 1_281_167  # training images
SIDE = 16  # tokens each way
DATA = DataConfig(
    name="made up", image_size=224, channels=3, crop="inception", augment="rand_augment",
    eval_resize=256,
)  # fmt: skip


def command() -> Callable[[], None]:
    """Defines the flags of this bench; what it returns runs once they are parsed."""
    records = flags.DEFINE_integer(
        "records", token_cache.RECORDS_PER_SHARD, "Records of a shard.", lower_bound=1
    )
    epochs = flags.DEFINE_integer("epochs", 300, "Views of ImageNet-1k.", lower_bound=1)
    images = flags.DEFINE_integer("images", 400, "JPEGs to decode.", lower_bound=1)

    def run() -> None:
        print(compare(records.value, epochs.value, images.value))

    return run


def compare(records: int, epochs: int, images: int) -> str:
    """Lines of text: the size of a cache, the time of a read and of an image, one thread each.

    Ids are uniform at random, which compresses worst. Files are in the operating system's cache
    for both.
    """
    with tempfile.TemporaryDirectory() as directory:
        cache = write(epath.Path(directory), records)
        size = sum(p.stat().length for p in epath.Path(directory).glob("*.arrayrecord")) / records
        order = np.random.default_rng(1).permutation(records)[:20_000]
        image = bytes(100_000)
        [cache.read(0, int(i), image) for i in order[:100]]
        start = time.perf_counter()
        [cache.read(0, int(i), image) for i in order]
        read = (time.perf_counter() - start) / len(order)
    encoded = [photographs.jpeg(0, i) for i in range(16)]
    example = transforms.TrainExample(DATA, seed=0, views=1)
    start = time.perf_counter()
    for i in range(images):
        example((0, i, {"image": encoded[i % len(encoded)], "label": 0}))
    decode = (time.perf_counter() - start) / images
    total = size * IMAGENET * epochs
    kilobytes = np.mean([len(x) for x in encoded]) / 1e3
    return "\n".join(
        [
            f"cache: {size:.1f} bytes per view of {SIDE**2} tokens, one shard of {records} records",
            f"ImageNet-1k x {epochs} views: {total / 1e9:.1f} GB",
            f"one read, random order: {read * 1e6:.1f} us",
            f"one image (JPEG 500x375 of {kilobytes:.0f} kB, inception crop to 224, RandAugment): "
            f"{decode * 1e6:.0f} us",
            f"reading tokens is {read / (read + decode):.2%} of the pipeline's time per image",
        ]
    )


def write(directory: epath.Path, records: int) -> token_cache.TokenCache:
    """A cache of one shard of random ids."""
    plan = token_cache.Plan(
        fingerprint={"tokenizer": section(VQGANConfig()), "shown": {}},
        views=1,
        examples=records,
        tokens=SIDE**2,
        codes=VQGANConfig().codes,
        records_per_shard=records,
    )
    random = np.random.default_rng(0)
    mark = source.mark(bytes(100_000))
    rows = ((random.integers(0, plan.codes, plan.tokens, np.uint16), mark) for _ in range(records))
    token_cache.write_shard(directory, plan, 0, rows)
    return token_cache.TokenCache(directory, plan)
