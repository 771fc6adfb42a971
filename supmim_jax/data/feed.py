"""What one host feeds its devices: decoded examples in batches, made by Grain. Knows no JAX.

The global batch of step s is entries [s * B, (s + 1) * B) of the training sequence, on every
topology; `rows` are those of it that this host's devices hold, and nothing else is read.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from supmim_jax.config import Config, DataConfig, SetupError, TokensConfig
from supmim_jax.data import records, sequence, token_cache, transforms, worker
from supmim_jax.data.crops import eval_image, whole_image
from supmim_jax.data.decode import BrokenRecord, decode_image

Arrays = dict[str, np.ndarray]  # of the examples of a batch, by the fields of types.Batch


def check(cfg: Config) -> None:
    """Opens both splits, making `fractals` if need be, before anything else is written.

    Raises:
      SetupError: a split or the token cache is missing or is not what the config says.
    """
    records.open_training_source(cfg.data, cfg.needs_masks)
    if not cfg.needs_masks:
        records.open_source(cfg.data, cfg.data.eval_split)
    if {"segmentation", "miou"} & set(cfg.eval.which):
        records.open_masks(cfg.data, cfg.data.eval_split)
    if cfg.tokens.cache:
        token_cache.open_cache(cfg)


class Feed(Iterator[Arrays]):
    """Batches of one host, and how many of their records were broken; each is logged once."""

    def __init__(self, batches: grain.DatasetIterator, data: DataConfig, split: str, remedy: str):
        self.batches, self.remedy = batches, remedy
        self.where = f"{data.name}, split {split},"
        self.broken, self.known = 0, set()

    def close(self) -> None:
        """Ends the threads or processes that decode."""
        self.batches.close()

    def __next__(self) -> Arrays:
        try:
            arrays = next(self.batches)
        except RuntimeError as error:
            raise worker.ended(error) from None
        ids = arrays.pop("broken")
        for example in ids[ids != sequence.NONE].tolist():
            self.broken += 1
            if example not in self.known:
                self.known.add(example)
                logging.error("Record %d of %s is broken; %s.", example, self.where, self.remedy)
        return arrays


def training(
    cfg: Config,
    rows: Sequence[int],
    first_step: int = 0,
    boxes: np.ndarray | None = None,
    skipped: int = 0,
) -> Feed:
    """Training batches from `first_step` to the last step.

    Args:
      cfg: the experiment.
      rows: of the global batch that are fed here.
      first_step: steps that are done.
      boxes: what contrastive crops are around, a table as in contrastive_crop.py; for
        data.contrastive_crop.boxes = "heat_map" alone. None: there are none yet.
      skipped: batches of the sequence that are left out before `first_step`.

    Raises:
      SetupError: the data set is missing or is not what the config says, or the table is not.
    """
    if boxes is not None:
        check_boxes(cfg.data, boxes)
    source = records.open_training_source(cfg.data, cfg.needs_masks)
    examples = (
        grain.MapDataset.range(len(rows) * (cfg.total_steps - first_step))
        .map(sequence.LocalPosition(rows, cfg.batch_size, first_step + skipped))
        .map(sequence.TrainingOrder(len(source), cfg.seed, cfg.data.repeats))
        .map(sequence.Intact(source, train_example(cfg, boxes)))
    )
    evaluated = cfg.eval.batch_size * len(rows) // cfg.batch_size * _eval_bytes(cfg)
    batches = _decoded(examples, len(rows), cfg.data, evaluated, bool(cfg.eval.every))
    return Feed(batches, cfg.data, cfg.data.train_split, "another record stands in for it")


def check_boxes(data: DataConfig, boxes: np.ndarray) -> None:
    """Raises SetupError unless crops follow such a table, a row for each training record."""
    if not data.learns_boxes:
        raise SetupError(
            f"A table of boxes was given, but config.data.crop is {data.crop!r} and "
            f"config.data.contrastive_crop.boxes is {data.contrastive_crop.boxes!r}: only crop "
            f"'contrastive' with boxes 'heat_map' follows one. Give none, or set both."
        )
    if boxes.dtype != np.uint8 or boxes.shape != (data.train_examples, 4):
        raise SetupError(
            f"The table of boxes is {boxes.dtype} of shape {boxes.shape}, but "
            f"config.data.train_examples = {data.train_examples} needs uint8 of shape "
            f"({data.train_examples}, 4). Find the boxes of this data set."
        )


def evaluation(cfg: Config, split: str, rows: Sequence[int]) -> Feed:
    """Every example of `split` once, in order; padding at the end has weight 0 and id -1."""
    source = records.open_source(cfg.data, split)
    return _once(source, transforms.EvalExample(cfg.data), cfg, split, rows)


def whole(cfg: Config, split: str, rows: Sequence[int]) -> Feed:
    """`evaluation` with the whole images, resized to squares, so that a box means all of them."""
    source = records.open_source(cfg.data, split)
    return _once(source, transforms.EvalExample(cfg.data, whole_image), cfg, split, rows)


def masked(cfg: Config, split: str, rows: Sequence[int]) -> Feed:
    """`evaluation` with masks in place of labels, cropped as the images are."""
    source = records.open_masks(cfg.data, split)
    return _once(source, transforms.MaskedExample(cfg.data), cfg, split, rows)


def _once(source, make, cfg: Config, split: str, rows: Sequence[int]) -> Feed:
    steps = math.ceil(len(source) / cfg.eval.batch_size)
    examples = (
        grain.MapDataset.range(len(rows) * steps)
        .map(sequence.LocalPosition(rows, cfg.eval.batch_size))
        .map(sequence.EvaluationRecord(source))
        .map(make)
    )
    batches = _decoded(examples, len(rows), cfg.data)
    return Feed(batches, cfg.data, split, "it counts as a grey image, if its label can be read")


def target_images(
    cfg: Config, first: int, stop: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images of records [first, stop) of a token cache, and the marks of their files, in batches.

    These are uint8 BxHxWxC and uint32 B. Record v * examples + i is view v of example i; the last
    batch may be smaller.
    """
    source = records.open_training_source(cfg.data)
    make = train_example(dataclasses.replace(cfg, tokens=TokensConfig()))
    examples = (
        grain.MapDataset.range(first, stop)
        .map(sequence.ViewOrder(len(source)))
        .map(sequence.Intact(source, transforms.TargetExample(make)))
    )
    for arrays in _decoded(examples, batch_size, cfg.data, drop=False):
        yield arrays["image"], arrays["mark"]


def train_example(cfg: Config, boxes: np.ndarray | None = None) -> Any:
    """What makes an example of a training record, tokens of the cache included."""
    if cfg.needs_masks:
        return transforms.MaskedTrainExample(cfg.data, cfg.seed)
    cache = token_cache.open_cache(cfg) if cfg.tokens.cache else None
    return transforms.TrainExample(
        cfg.data,
        cfg.seed,
        cfg.num_views,
        with_target=cfg.needs_target,
        tokens=cache,
        crops=cfg.crops_per_example,
        boxes=boxes,
    )


def first_images(cfg: Config, count: int) -> np.ndarray:
    """The first `count` training images that are whole, as evaluation sees them: uint8 NxHxWxC.

    Raises:
      SetupError: there is none.
    """
    source, images = records.open_training_source(cfg.data), []
    for i in range(len(source)):
        try:
            images.append(eval_image(decode_image(source[i], cfg.data, i), cfg.data))
        except BrokenRecord:
            continue
        if len(images) == count:
            break
    if not images:
        raise SetupError(f"No image of {cfg.data.name!r}, {cfg.data.train_split}, can be decoded.")
    return np.stack(images)


def _eval_bytes(cfg: Config) -> int:
    """Of an image that an evaluation reads, and of its mask where it reads one."""
    masks = 4 * bool({"segmentation", "miou"} & set(cfg.eval.which))
    return cfg.data.image_size**2 * (cfg.data.channels + masks)


def _decoded(
    examples: grain.MapDataset,
    size: int,
    data: DataConfig,
    later: int = 0,
    beside: bool = False,
    drop: bool = True,
) -> grain.DatasetIterator:
    """Batches decoded ahead, each by one thread or process.

    Args:
      examples: of which `size` are a batch.
      size: as above.
      data: the config's section.
      later: bytes of a batch that workers are asked for later on, so that it is known now.
      beside: whether that is while these workers wait.
      drop: whether a last batch that is smaller is left out.

    Raises:
      SetupError: the workers' shared memory is too small.
    """
    batches = examples.batch(size, drop_remainder=drop)
    threads, ahead = data.threads, max(data.prefetch, data.threads)
    options = grain.ReadOptions(1, 1) if data.workers else grain.ReadOptions(threads, ahead)
    local = batches.to_iter_dataset(options)
    if data.workers:
        first = examples[0] if len(examples) else {}
        arrays = (size * np.asarray(x).nbytes for x in first.values())
        now = sum(math.ceil(x / worker.PAGE) * worker.PAGE for x in arrays)
        worker.check_room(data.workers, now + later if beside else max(now, later))
        if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl flags
            flags.FLAGS.mark_as_parsed()
        worker.keep_light()
        local = local.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.workers))
    return iter(local)
