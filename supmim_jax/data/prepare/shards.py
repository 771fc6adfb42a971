"""Shards: how records are divided into files, and writing one so that it is whole or not there.

What the command says while it works, on stderr.

Where a data set goes: <data_dir>/<name>/<version>, which appears when it is complete.

Until then it grows in <version>.incomplete.prepare beside it, which tfds takes for no version, and
a command that was killed goes on there. The last step is one rename. A bucket has none: the objects
are copied within it, dataset_info.json after all others, and nothing opens a data set without that.

What was, or would be, prepared: splits, sizes, and how to train on it."""

import concurrent.futures
import contextlib
import fcntl
import json
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeVar

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from tqdm import tqdm

from supmim_jax import storage
from supmim_jax.data import source
from supmim_jax.errors import SetupError
from supmim_jax.metrics import write_json

LOG_EVERY = 30.0  # seconds between lines where stderr is a file

ProgressItem = TypeVar("Item")


class Lines:
    """stderr of a log file: each state of a bar on a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


@contextlib.contextmanager
def progress_bar(what: str, total: int, unit: str) -> Iterator[tqdm]:
    """A bar of one line on a terminal, a line every LOG_EVERY seconds in a log file."""
    terminal = sys.stderr.isatty()
    shown = tqdm(
        desc=what,
        total=total,
        unit=f" {unit}",
        unit_scale=unit == "B",
        file=sys.stderr if terminal else Lines(),
        mininterval=0.2 if terminal else LOG_EVERY,
        ncols=None if terminal else 80,
        ascii=not terminal,
    )
    with shown:
        yield shown


def counted(items: Iterable[ProgressItem], shown: tqdm) -> Iterator[ProgressItem]:
    """Passes the items on and counts them."""
    for item in items:
        yield item
        shown.update()


def progress_size(count: int) -> str:
    """Bytes as one reads them."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# A random read costs time for each group of its file, and a group is decoded as a whole: images,
# of which one may be large, get groups of one, and few records per file (801 us a read at 131k
# records in groups of one). Encoded images do not compress: without zstd a shard is written four
# times as fast, and is no larger.
WRITER = "group_size:1,uncompressed"
RECORDS_PER_SHARD = 2**14
BYTES_PER_SHARD = 2**29
RECORD_BYTES, SHARD_BYTES = 160, 2**17  # ArrayRecord's own, at most; and one in 2000 of the data

Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    file: str  # its name, as tfds has it
    records: int
    bytes: int  # of its records, as far as that is known beforehand
    read: Callable[[], Iterator[bytes]]  # the records; more or fewer than `records` are an error


def cut(sizes: Sequence[int]) -> list[range]:
    """The records of each shard, given the bytes of every record.

    In order; each shard but the last is filled until the next record would exceed
    RECORDS_PER_SHARD or BYTES_PER_SHARD (which a single record may exceed).
    """
    shards, start, total = [], 0, 0
    for index, size in enumerate(sizes):
        full = index - start == RECORDS_PER_SHARD or total + size > BYTES_PER_SHARD
        if full and index > start:
            shards.append(range(start, index))
            start, total = index, 0
        total += size
    return [*shards, range(start, len(sizes))]


def bytes_on_disk(jobs: Iterable[Job]) -> int:
    """An upper bound of what the shards take."""
    return sum(
        job.bytes + job.bytes // 2000 + job.records * RECORD_BYTES + SHARD_BYTES for job in jobs
    )


def write_all(directory: epath.Path, jobs: Sequence[Job]) -> None:
    """Writes the shards that are not in the directory yet.

    Raises:
      SetupError: a shard has another number of records than its job says, or cannot be written.
    """
    there = {path.name for path in storage.children(directory)}
    missing = [job for job in jobs if job.file not in there]
    if len(missing) < len(jobs):
        say(f"Going on: {len(jobs) - len(missing)} of {len(jobs)} shards are written.")
    with progress_bar("writing", sum(job.records for job in missing), "records") as bar:
        for job in missing:
            write(directory / job.file, job.records, counted(job.read(), bar))


def write(path: epath.Path, count: int, records: Iterator[bytes]) -> None:
    """Writes a shard of `count` records, under its name when it is complete.

    Raises:
      SetupError: there are more or fewer records, or the file cannot be written.
    """
    with storage.written(path) as part:
        try:
            writer = array_record_module.ArrayRecordWriter(str(part), WRITER)
            try:
                for record in records:
                    writer.write(record)
            finally:
                writer.close()
            reader = array_record_module.ArrayRecordReader(str(part))
            found = reader.num_records()
            reader.close()
        except (RuntimeError, ValueError) as error:
            raise SetupError(
                f"{part} cannot be written: {str(error)[:300]}. See that its disk has room, then "
                f"run the same command again: it goes on with this shard."
            ) from None
        if found != count:
            raise SetupError(f"{path} would have {found} records, expected {count}. Run it again.")


def ahead(make: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """make(item) of each item, in order, by a few threads that are never far ahead."""
    threads = min(8, os.cpu_count() or 1)
    pending: deque[concurrent.futures.Future] = deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(make, item))
                if len(pending) >= 4 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


MANIFEST = "prepared.json"  # what the data were made of; stays beside them
UNFINISHED = ".incomplete.prepare"
LOCK = "lock"
INFO = "dataset_info.json"  # without which tfds takes a directory for no data set


def data_dir(given: str) -> epath.Path:
    """--data_dir; where it is empty, tfds's own default."""
    return storage.location(given or tfds.core.constants.DATA_DIR)


def unfinished(final: epath.Path) -> epath.Path:
    return final.with_name(final.name + UNFINISHED)


def manifest(directory: epath.Path) -> dict:
    """What prepared.json in the directory says; {} if there is none, or half of one."""
    try:
        found = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_done(final: epath.Path, made_of: dict) -> bool:
    """Whether the data set is there and was made of this.

    Raises:
      SetupError: something else is there.
    """
    if not final.exists():
        return False
    found = manifest(final)
    if found.get("fingerprint") != made_of["fingerprint"]:
        origin = f"made of {found.get('source')}" if found else f"without {MANIFEST}"
        raise SetupError(
            f"{final} already holds a data set ({origin}), and not of {made_of['source']} as it "
            f"is now, with these options. Remove that directory, or choose another name (--as) "
            f"or --data_dir."
        )
    return True


@contextlib.contextmanager
def writing(final: epath.Path, made_of: dict) -> Iterator[epath.Path]:
    """The directory to write in; it becomes `final` if all goes well.

    Shards of an earlier run are kept if they were made of the same.

    Raises:
      SetupError: another process is writing there.
    """
    part = unfinished(final)
    storage.make_directory(part)
    with _locked(part):
        found = manifest(part)
        if found.get("fingerprint") != made_of["fingerprint"]:
            if found:
                say(f"{made_of['source']} or the options changed: starting anew.")
            for path in storage.children(part):
                if path.name != LOCK:
                    path.unlink()
            write_json(part / MANIFEST, made_of)
        yield part
        for path in part.iterdir():
            if path.name == LOCK or path.name.endswith(".part"):
                path.unlink()
        source.write_checksums(part)
        storage.rename(part, final, last=INFO)


@contextlib.contextmanager
def _locked(directory: epath.Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of a process that died."""
    if not storage.is_local(directory):
        yield
        return
    with open(directory / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SetupError(
                f"Another process is writing to {directory}. Wait for it, or end it first."
            ) from None
        yield


def check_space(path: epath.Path, needed: int) -> None:
    """Raises SetupError if a local disk has fewer bytes free."""
    free = storage.free_bytes(path)
    if free is not None and needed > free:
        raise SetupError(
            f"{path} needs {progress_size(needed)}, and its disk has {progress_size(free)} free. "
            f"Free some, or choose another --data_dir (of a bucket: another TMPDIR)."
        )


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
        f"  {split.name:<12} {split.records:>12,} records {progress_size(split.bytes):>12} "
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
    size = "unknown" if needed is None else progress_size(needed)
    room = "unknown" if free is None else progress_size(free)
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
    part = unfinished(final)
    same = manifest(part).get("fingerprint") == fingerprint
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
