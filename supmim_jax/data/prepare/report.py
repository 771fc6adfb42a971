"""What was, or would be, prepared: splits, sizes, and how to train on it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from supmim_jax import storage
from supmim_jax.data.prepare import progress, target
from supmim_jax.data.prepare.shards import Job, bytes_on_disk

AGAIN = "Prepared already"
NAMED = 20  # files that a list names; the rest is a number


@dataclass(frozen=True)
class Split:
    name: str
    records: int
    bytes: int  # of the records
    shards: int


def named(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f"\n  ... and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return "".join(f"\n  {name}" for name in names[:NAMED]) + more


def ignored(names: Sequence[str]) -> str:
    """What is left out by the endings of its names, in a line."""
    endings = Counter(PurePosixPath(name).suffix.lower() or "no ending" for name in names)
    counts = ", ".join(f"{ending} {count}" for ending, count in endings.most_common(8))
    return f"Ignored by their names' endings: {len(names)} files ({counts}), as {names[0]}."


def table(splits: Sequence[Split]) -> str:
    rows = [
        f"  {split.name:<12} {split.records:>12,} records {progress.size(split.bytes):>12} "
        f"{split.shards:>6,} shards"
        for split in splits
    ]
    return "\n".join(rows)


def splits_of(jobs: dict[str, list[Job]]) -> list[Split]:
    return [
        Split(name, sum(j.records for j in of), sum(j.bytes for j in of), len(of))
        for name, of in jobs.items()
    ]


def planned(
    final: epath.Path,
    splits: Sequence[Split],
    needed: int | None,
    features: tfds.features.FeaturesDict | None = None,
) -> str:
    """What --dry_run prints; `needed` is in bytes, None where nobody knows it beforehand."""
    needs = "".join(f"\n  training will need --config.data.{o}" for o in white(features or {}))
    free = storage.free_bytes(final)
    size = "unknown" if needed is None else progress.size(needed)
    room = "unknown" if free is None else progress.size(free)
    enough = "" if None in (needed, free) else f" ({'enough' if needed <= free else 'NOT ENOUGH'})"
    return (
        f"Would write {final}\n{table(splits) if splits else '  splits: not known beforehand'}\n"
        f"  needs at most {size}; free there: {room}{enough}{needs}\nNothing was written."
    )


def white(features: Mapping[str, tfds.features.FeatureConnector]) -> list[str]:
    """The override that images need which are no bytes: no file says which value is white."""
    image = dict(features).get("image")
    if not isinstance(image, tfds.features.Image) or image.np_dtype == np.uint8:
        return []
    return [f"max_value=<which value of {np.dtype(image.np_dtype).name} is white>"]


def missing_bytes(final: epath.Path, jobs: dict[str, list[Job]], fingerprint: str) -> int:
    """Of the shards that an interrupted run has not written."""
    part = target.unfinished(final)
    same = target.manifest(part).get("fingerprint") == fingerprint
    there = {path.name for path in part.iterdir()} if same else set()
    return bytes_on_disk(job for of in jobs.values() for job in of if job.file not in there)


def finished(
    builder: tfds.core.DatasetBuilder, name: str, data_dir: str, done: str, max_value: float = 0.0
) -> str:
    """The last words: what is there now, and the overrides to train on it."""
    info = builder.info
    splits = [
        Split(s.name, s.num_examples, s.num_bytes, s.num_shards) for s in info.splits.values()
    ]
    if done == AGAIN:
        done = f"{AGAIN} (to make it anew, remove it first)"
    labels = {k: f for k, f in info.features.items() if isinstance(f, tfds.features.ClassLabel)}
    field = "label" if "label" in labels else next(iter(labels), "")
    lines = [f"{done}: {builder.data_path}", table(splits)]
    overrides = [f"name={name}"] + ([f"data_dir={data_dir}"] if data_dir else [])
    if field:
        lines.append(f"  {labels[field].num_classes:,} classes in the feature {field!r}")
        overrides.append(f"num_classes={labels[field].num_classes}")
        overrides += [f"label_field={field}"] if field != "label" else []
    else:
        lines.append(f"  no classes; the features are {', '.join(info.features)}")
    overrides += [f"max_value={max_value:.10g}"] if max_value else white(info.features)
    names = [split.name for split in splits]
    if "train" in names:
        overrides.append(f"train_examples={info.splits['train'].num_examples}")
    if "validation" not in names and "test" in names:
        overrides.append("eval_split=test")
    lines.append("Train on it with\n  " + " ".join(f"--config.data.{o}" for o in overrides))
    return "\n".join(lines)
