"""Shards: how records are divided into files, and writing one so that it is whole or not there."""

import concurrent.futures
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from array_record.python import array_record_module
from etils import epath

from supmim_jax import storage
from supmim_jax.config import SetupError
from supmim_jax.data.prepare import progress

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
        progress.say(f"Going on: {len(jobs) - len(missing)} of {len(jobs)} shards are written.")
    with progress.bar("writing", sum(job.records for job in missing), "records") as bar:
        for job in missing:
            write(directory / job.file, job.records, progress.counted(job.read(), bar))


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
