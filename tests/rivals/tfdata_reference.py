"""The rival: the training images that a tf.data pipeline makes of the same records and boxes.

A process of its own, so that TensorFlow and JAX never share one: `Rival` starts it and speaks to
it, `main` is what runs there. Its standard input has one pickled message, then requests: a line of
JSON each, answered by another.
"""

import json
import os
import pickle
import resource
import sys
import tempfile
import time

import numpy as np

from rivals.companion import Companion

# dct_method: TensorFlow's default, "", is the fast and less exact one. antialias: what makes a
# smaller image a mean of the larger one's pixels; off by default.
VARIANTS = {
    "tf.data": ("", False),
    "tf.data, accurate DCT": ("INTEGER_ACCURATE", False),
    "tf.data, antialias": ("", True),
    "tf.data, accurate DCT, antialias": ("INTEGER_ACCURATE", True),
}


class Rival(Companion):
    """tf.data on `cores` cores over tf.Examples with "image" and "label"."""

    def __init__(self, examples: list[bytes], boxes: np.ndarray, size: int, batch: int, cores: int):
        """boxes: int32 Nx5, top, left, height, width, mirrored, one for each example."""
        super().__init__("tfdata_reference", "tf.data", {"TF_CPP_MIN_LOG_LEVEL": "3"})
        self.version = self.asked(pickle.dumps((examples, boxes, size, batch, cores)))["version"]

    def measure(self, variant: str, batches: int) -> dict[str, float]:
        """Seconds of wall clock and of CPU for the next batches, and `halves` of the last one."""
        return self.asked([variant, batches])


def dataset(tf, path: str, boxes: np.ndarray, size: int, batch: int, cores: int, variant: str):
    """Endless batches of {"image": uint8 BxHxWx3, "label": int64 B} of the records in `path`."""
    dct_method, antialias = VARIANTS[variant]
    wanted = {"image": tf.io.FixedLenFeature([], tf.string)}
    wanted["label"] = tf.io.FixedLenFeature([], tf.int64)

    def example(record, box):
        parsed = tf.io.parse_single_example(record, wanted)
        image = tf.io.decode_and_crop_jpeg(
            parsed["image"], box[:4], channels=3, dct_method=dct_method
        )
        image = tf.image.resize(image, (size, size), method="bilinear", antialias=antialias)
        image = tf.cond(box[4] == 1, lambda: image[:, ::-1], lambda: image)
        return {"image": tf.cast(image, tf.uint8), "label": parsed["label"]}

    options = tf.data.Options()
    options.deterministic = False
    options.threading.private_threadpool_size = cores
    options.threading.max_intra_op_parallelism = 1
    pairs = tf.data.Dataset.zip(
        (tf.data.TFRecordDataset(path), tf.data.Dataset.from_tensor_slices(boxes))
    )
    parallel = None if cores == 1 else cores
    images = pairs.repeat().map(example, num_parallel_calls=parallel).batch(batch)
    return (images if cores == 1 else images.prefetch(4)).with_options(options)


def main() -> None:
    import tensorflow as tf

    examples, boxes, size, batch, cores = pickle.load(sys.stdin.buffer)
    tf.config.threading.set_intra_op_parallelism_threads(cores)
    tf.config.threading.set_inter_op_parallelism_threads(cores)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "examples.tfrecord")
        with tf.io.TFRecordWriter(path) as writer:
            for encoded in examples:
                writer.write(encoded)
        made = {
            name: dataset(tf, path, boxes, size, batch, cores, name).as_numpy_iterator()
            for name in VARIANTS
        }
        settled()
        print(json.dumps({"version": tf.__version__}), flush=True)
        for line in sys.stdin.buffer:
            variant, batches = json.loads(line)
            wall, cpu = time.perf_counter(), cpu_seconds()
            for _ in range(batches):
                images = next(made[variant])["image"]
            wall_end, cpu_end = settled()
            answer = {"wall": wall_end - wall, "cpu": cpu_end - cpu}
            answer |= {"images": batches * batch, "halves": halves(images)}
            print(json.dumps(answer), flush=True)


def halves(images: np.ndarray) -> list[list[float]]:
    """By which to tell images apart: the mean of every image's left half, and of its right."""
    pixels = images[:, ::8, ::8].astype(np.float64)
    middle = pixels.shape[2] // 2
    return [[float(x[:, :middle].mean()), float(x[:, middle:].mean())] for x in pixels]


def settled() -> tuple[float, float]:
    """When this process came to rest, and its CPU seconds: what it makes ahead counts, too.

    It began with as much ahead, made while others were measured.
    """
    cpu, since = cpu_seconds(), time.perf_counter()
    while time.perf_counter() - since < 0.1:
        time.sleep(0.01)
        if (now := cpu_seconds()) - cpu > 0.002:
            cpu, since = now, time.perf_counter()
    return since, cpu


def cpu_seconds() -> float:
    """User and system time of all threads of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
