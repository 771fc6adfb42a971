"""What evaluations need of the data, looked at before a run's first step."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from supmim_jax.config import Config, SetupError
from supmim_jax.data import records
from supmim_jax.data.decode import BrokenRecord

COUNTED = 20_000  # labels are counted in splits of so many records or fewer
GLANCE = 256  # records of which the label is read in any case
THREADS = 16
TRAINING = {"knn", "linear", "few_shot"}  # also learn from the training split


def check(cfg: Config, split: str) -> None:
    """Returns if nothing is known that an evaluation of `cfg` on `split` would fail by.

    No image is decoded. In a split of more than COUNTED records, whose labels would take long to
    read, a class may still have too few: then that evaluation alone fails.

    Raises:
      SetupError: a split is empty or has no labels or masks, or a class has too few examples.
    """
    if cfg.objective.name == "vqgan":
        return
    which = set(cfg.eval.which)
    if "segmentation" in which:
        records.open_masks(cfg.data, cfg.data.train_split)
    if not which - {"segmentation", "miou"}:
        return
    counts = _counts(cfg, split, "retrieval" in which)
    if counts is not None and counts.max() < 2:
        raise SetupError(
            f"config.eval.which has 'retrieval', but no two examples of {split!r} share a label: "
            f"there is nothing to find. Leave it out, or choose another config.data.eval_split."
        )
    if not which & TRAINING:
        return
    train, shots = cfg.data.train_split, cfg.eval.few_shot.shots
    counts = _counts(cfg, train, bool(which & {"linear", "few_shot"}))
    if "linear" in which and counts is not None and counts.max() < 2:
        raise SetupError(
            f"config.eval.which has 'linear', but no two examples of {train!r} share a label, and "
            f"none can be held out. Leave it out, or choose another config.data.train_split."
        )
    if "few_shot" not in which:
        return
    if counts is not None and counts.min() < shots:
        raise SetupError(
            f"config.eval.few_shot.shots is {shots}, but class {counts.argmin()} has "
            f"{counts.min()} examples in {train!r}. Set it to {counts.min()} or fewer, or leave "
            f"'few_shot' out of config.eval.which."
        )
    examples, classes = len(records.open_source(cfg.data, train)), cfg.data.num_classes
    if examples < shots * classes:
        raise SetupError(
            f"config.eval.few_shot.shots is {shots}, but {train!r} has {examples} examples of "
            f"{classes} classes. Set fewer, or leave 'few_shot' out of config.eval.which."
        )


def _counts(cfg: Config, split: str, wanted: bool) -> np.ndarray | None:
    """Examples of each class, if wanted and the split is small; some labels are looked at anyway.

    Raises:
      SetupError: the split is empty, or a label is no class.
    """
    source = records.open_source(cfg.data, split)
    whole = wanted and len(source) <= COUNTED

    def label(index: int) -> int | None:
        try:
            return int(source[index]["label"])
        except BrokenRecord:
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(label, range(len(source) if whole else min(len(source), GLANCE))))
    labels = np.array([x for x in found if x is not None], np.int64)
    classes = cfg.data.num_classes
    if not len(source) or (len(labels) and not 0 <= labels.min() <= labels.max() < classes):
        odd = f"a label {labels.min()} or {labels.max()}" if len(source) else "no examples"
        raise SetupError(
            f"{split!r} of {cfg.data.name!r} has {odd}; {', '.join(cfg.eval.which)} need labels "
            f"from 0 to {classes - 1}. Choose another config.data.eval_split or train_split."
        )
    return np.bincount(labels, minlength=classes) if whole else None
