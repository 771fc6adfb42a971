"""Where a data set goes, how its shards are written, and what the command prints.

A data set grows in <version>.incomplete.prepare, beside its final place
<data_dir>/<name>/<version>; tfds does not take that name for a version. A shard gets its name once
it is complete, so a command that was killed continues with the missing shards. The last step is one
rename. A bucket cannot rename: there the files are copied, and last of all dataset_info.json,
without which nothing opens a data set.

tfds's own writer does not suit folders: it keeps nothing of an interrupted run, and to preserve the
order of records it sorts a whole split in memory.
"""

import contextlib
import fcntl
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from tensorflow_datasets.core.dataset_info import write_dataset_info_proto
from tensorflow_datasets.core.proto import dataset_info_pb2
from tqdm import tqdm

from supmim_jax import storage
from supmim_jax.data import source
from supmim_jax.errors import SetupError

# A random read costs time for each group of its file, and a group is decoded as a whole: images,
# of which one may be large, get groups of one, and few records per file (801 us a read at 131k
# records in groups of one). Encoded images do not compress: without zstd a shard is written four
# times as fast, and is no larger.
WRITER = "group_size:1,uncompressed"
RECORDS_PER_SHARD = 2**14
BYTES_PER_SHARD = 2**29
RECORD_BYTES, SHARD_BYTES = 160, 2**17  # ArrayRecord's own, at most; and one in 2000 of the data

MANIFEST = "prepared.json"  # what the data set was made of; stays beside it
UNFINISHED = ".incomplete.prepare"
LOCK = "lock"
INFO = "dataset_info.json"  # without which tfds takes a directory for no data set
LOG_EVERY = 30.0  # seconds between lines of progress in a log file
MAKE_ROOM = "Free some, or choose another --data_dir (of a bucket: another TMPDIR)."
LISTED = 20  # names in a list; the rest is a number


@dataclass(frozen=True)
class Shard:
    """A shard to write."""

    file: str  # its name, as tfds has it
    records: int
    bytes: int  # of its records, as far as that is known beforehand
    read: Callable[[], Iterator[bytes]]  # the records; more or fewer than `records` are an error


def cut(sizes: Sequence[int]) -> list[range]:
    """The records of each shard, given the bytes of every record.

    In order; each shard but the last is filled until the next record would exceed
    RECORDS_PER_SHARD or BYTES_PER_SHARD (which a single record may exceed).
    """
    parts, start, total = [], 0, 0
    for index, size in enumerate(sizes):
        full = index - start == RECORDS_PER_SHARD or total + size > BYTES_PER_SHARD
        if full and index > start:
            parts.append(range(start, index))
            start, total = index, 0
        total += size
    return [*parts, range(start, len(sizes))]


def write_shard(path: epath.Path, shard: Shard, bar: tqdm) -> None:
    """Writes a shard, under its name when it is complete; raises SetupError if it cannot be."""
    with storage.written(path) as part:
        try:
            writer = array_record_module.ArrayRecordWriter(str(part), WRITER)
            try:
                for record in shard.read():
                    writer.write(record)
                    bar.update()
            finally:
                writer.close()
            # Read back: what counts is what is in the file.
            records = source.count(str(part))
        except (RuntimeError, ValueError) as error:
            raise SetupError(
                f"{part} cannot be written: {str(error)[:300]}. See that its disk has room, then "
                f"run the same command again: it goes on with this shard."
            ) from None
        if records != shard.records:
            raise SetupError(
                f"{path} would have {records} records, expected {shard.records}. Run it again."
            )


def root(data_dir: str) -> epath.Path:
    """--data_dir; where it is empty, tfds's own default."""
    return storage.location(data_dir or tfds.core.constants.DATA_DIR)


def unfinished(final: epath.Path) -> epath.Path:
    """Where the data set grows."""
    return final.with_name(final.name + UNFINISHED)


def manifest(directory: epath.Path) -> dict:
    """The contents of prepared.json in the directory; {} if it is missing or truncated."""
    try:
        values = storage.read_json(directory / MANIFEST, "")
    except SetupError:
        return {}
    return values if isinstance(values, dict) else {}


def is_there(final: epath.Path) -> bool:
    """Whether a data set is there; in a bucket it is once its last file is."""
    return (final if storage.is_local(final) else final / INFO).exists()


def is_done(final: epath.Path, made_of: dict) -> bool:
    """Whether the data set exists; raises SetupError if it was made of something else."""
    if not is_there(final):
        return False
    there = manifest(final)
    if there.get("fingerprint") != made_of["fingerprint"]:
        origin = f"made of {there.get('source')}" if there else f"without {MANIFEST}"
        raise SetupError(
            f"{final} already holds a data set ({origin}), and not of {made_of['source']} as it "
            f"is now, with these options. Remove that directory, or choose another name (--as) "
            f"or --data_dir."
        )
    return True


def write(
    final: epath.Path,
    made_of: dict,
    info: dataset_info_pb2.DatasetInfo,
    splits: dict[str, list[Shard]],
    features: tfds.features.FeaturesDict,
    write_others: Callable[[epath.Path], None],
    dry_run: bool,
) -> str:
    """Writes a data set, continuing where an earlier run stopped; `dry_run` returns the plan.

    Args:
      final: where it is to be.
      made_of: the source and its fingerprint, and what else prepared.json is to tell.
      info: what tfds is to read in dataset_info.json, but for the format and the shards.
      splits: the shards of each.
      features: of a record.
      write_others: writes the other files that tfds reads into a directory.
      dry_run: writes nothing.

    Raises:
      SetupError: the disk is too small, another process writes there, or a shard is not right.
    """
    part = unfinished(final)

    def missing() -> list[Shard]:
        same = manifest(part).get("fingerprint") == made_of["fingerprint"]
        there = {path.name for path in storage.children(part)} if same else set()
        return [shard for of in splits.values() for shard in of if shard.file not in there]

    needed = sum(
        shard.bytes + shard.bytes // 2000 + shard.records * RECORD_BYTES + SHARD_BYTES
        for shard in missing()
    )
    if dry_run:
        rows = [
            split_row(name, sum(s.records for s in of), sum(s.bytes for s in of), len(of))
            for name, of in splits.items()
        ]
        return plan(final, rows, needed, features)
    storage.check_disk_space(final, needed, "the data set", MAKE_ROOM)
    with writing(final, made_of):
        # Again, now that the directory is ours: another process may have written shards meanwhile.
        todo, count = missing(), sum(map(len, splits.values()))
        if len(todo) < count:
            say(f"Going on: {count - len(todo)} of {count} shards are written.")
        with progress("writing", sum(shard.records for shard in todo), "records") as bar:
            for shard in todo:
                write_shard(part / shard.file, shard, bar)
        write_others(part)
        info.file_format = "array_record"
        for split in info.splits:
            split.shard_lengths[:] = [shard.records for shard in splits[split.name]]
        write_dataset_info_proto(info, part)
    return ""


@contextlib.contextmanager
def writing(final: epath.Path, made_of: dict) -> Iterator[None]:
    """Locks the unfinished directory, which becomes `final` if the context ends well.

    Shards of an earlier run stay if they were made of the same. Raises SetupError if another
    process is writing there.
    """
    part = unfinished(final)
    storage.make_directory(part)
    with contextlib.ExitStack() as stack:
        if storage.is_local(part):  # a bucket has no locks
            file = stack.enter_context(open(part / LOCK, "w"))
            try:  # the system frees the lock of a process that died
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SetupError(
                    f"Another process is writing to {part}. Wait for it, or end it first."
                ) from None
        earlier = manifest(part)
        if earlier.get("fingerprint") != made_of["fingerprint"]:
            if earlier:
                say(f"{made_of['source']} or the options changed: starting anew.")
            for path in storage.children(part):
                if path.name != LOCK:
                    path.unlink()
            storage.write_json(part / MANIFEST, made_of)
        yield
        for path in part.iterdir():
            if path.name == LOCK or path.name.endswith(".part"):
                path.unlink()
        source.write_checksums(part)
        storage.rename(part, final, last=INFO)


class _Lines:
    """stderr in a log file: prints each state of a progress bar on its own line."""

    def write(self, text: str) -> None:
        if text.strip():
            say(text.strip())

    def flush(self) -> None:
        sys.stderr.flush()


def progress(what: str, total: int, unit: str) -> tqdm:
    """A bar of one line on a terminal, a line every LOG_EVERY seconds in a log file."""
    terminal = sys.stderr.isatty()
    return tqdm(
        desc=what,
        total=total,
        unit=f" {unit}",
        unit_scale=unit == "B",
        file=sys.stderr if terminal else _Lines(),
        mininterval=0.2 if terminal else LOG_EVERY,
        ncols=None if terminal else 80,
        ascii=not terminal,
    )


def say(line: str) -> None:
    """Prints a line during the work; stdout is for the final message."""
    print(line, file=sys.stderr, flush=True)


def format_bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def listed(rows: Sequence[str]) -> str:
    """The first rows, one a line, and how many more there are."""
    more = f"\n  ... and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
    return "".join(f"\n  {row}" for row in rows[:LISTED]) + more


def ignored(names: Sequence[str]) -> str:
    """One line about the files that are ignored by their extensions."""
    endings = Counter(PurePosixPath(name).suffix.lower() or "no ending" for name in names)
    counts = ", ".join(f"{ending} {count}" for ending, count in endings.most_common(8))
    return f"Ignored by their names' endings: {len(names)} files ({counts}), as {names[0]}."


def split_row(name: str, records: int, size: int, shards: int) -> str:
    return f"  {name:<12} {records:>12,} records {format_bytes(size):>12} {shards:>6,} shards"


def _white(features: tfds.features.FeaturesDict) -> list[str]:
    """The override that non-uint8 images need: no file says which value is white."""
    dtype = np.dtype(features["image"].np_dtype)
    return [] if dtype == np.uint8 else [f"max_value=<which value of {dtype.name} is white>"]


def plan(
    final: epath.Path,
    rows: Sequence[str],
    needed: int | None,
    features: tfds.features.FeaturesDict,
) -> str:
    """What --dry_run prints; `needed` is in bytes, or None if it cannot be known in advance."""
    free = storage.free_bytes(final)
    size, room = ("unknown" if x is None else format_bytes(x) for x in (needed, free))
    enough = "" if None in (needed, free) else f" ({'enough' if needed <= free else 'NOT ENOUGH'})"
    lines = [f"Would write {final}", *(rows or ["  splits: not known beforehand"])]
    lines += [f"  needs at most {size}; free there: {room}{enough}"]
    lines += [f"  training will need --config.data.{override}" for override in _white(features)]
    return "\n".join([*lines, "Nothing was written."])


def report(
    builder: tfds.core.DatasetBuilder, name: str, data_dir: str, done: str, max_value: float = 0.0
) -> str:
    """The final message: what was `done`, and the overrides to train on it.

    `max_value` is white in its images of more than 8 bits; 0 where there are none.
    """
    info = builder.info
    if done.endswith("already"):
        done += " (to make it anew, remove it first)"
    lines = [f"{done}: {builder.data_path}"]
    lines += [
        split_row(split.name, split.num_examples, split.num_bytes, split.num_shards)
        for split in info.splits.values()
    ]
    overrides = [f"name={name}"] + ([f"data_dir={data_dir}"] if data_dir else [])
    labels = {k: f for k, f in info.features.items() if isinstance(f, tfds.features.ClassLabel)}
    if labels:
        field = "label" if "label" in labels else next(iter(labels))
        lines.append(f"  {labels[field].num_classes:,} classes in the feature {field!r}")
        overrides.append(f"num_classes={labels[field].num_classes}")
        overrides += [f"label_field={field}"] if field != "label" else []
    else:
        lines.append(f"  no classes; the features are {', '.join(info.features)}")
    channels = info.features["image"].shape[-1] if "image" in info.features else None
    overrides += [f"channels={channels}"] if channels in (1, 3) else []
    overrides += [f"max_value={max_value:.10g}"] if max_value else _white(info.features)
    if "train" in info.splits:
        overrides.append(f"train_examples={info.splits['train'].num_examples}")
    if "validation" not in info.splits and "test" in info.splits:
        overrides.append("eval_split=test")
    lines.append("Train on it with\n  " + " ".join(f"--config.data.{o}" for o in overrides))
    return "\n".join(lines)
