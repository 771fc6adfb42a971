"""Seals: what tells, without reading all of it, whether a file is still the one that was written.

`data.prepare` leaves seals.json beside a data set: of each shard its size and a checksum of both
ends, of the small files one of all their bytes. Shards that were swapped, replaced, cut or appended
to are found when the data set is opened. Bytes between the ends are in ArrayRecord's checksums,
which are looked at record by record. Checksums are no signatures: they find accidents.
"""

import concurrent.futures
import functools
import json
import zlib

from etils import epath

from supmim_jax.config import SetupError
from supmim_jax.data import readers

FILE = "seals.json"
END = 2**12  # bytes at each end of an image
SHARD_END = 2**16  # of a shard
UNSEALED = (FILE, "lock")


def mark(encoded: bytes) -> int:
    """CRC-32 of an image's length and of its ends, and so of all of a small one."""
    found = zlib.crc32(len(encoded).to_bytes(8, "little"))
    if len(encoded) <= 2 * END:
        return zlib.crc32(encoded, found)
    return zlib.crc32(encoded[-END:], zlib.crc32(encoded[:END], found))


def seal(path: epath.Path) -> str:
    """The seal of a file."""
    size = path.stat().length
    with path.open("rb") as file:
        if "array_record" not in path.name:
            return f"{size}-{zlib.crc32(file.read()):08x}"
        found = zlib.crc32(file.read(SHARD_END))
        file.seek(max(size - SHARD_END, 0))
        return f"{size}-{zlib.crc32(file.read(SHARD_END), found):08x}"


def write(directory: epath.Path) -> None:
    """Seals all files of a data set that is complete."""
    paths = sorted(path for path in directory.iterdir() if path.name not in UNSEALED)
    paths = [path for path in paths if not path.name.endswith(".part")]
    found = dict(zip((path.name for path in paths), _each(paths), strict=True))
    part = directory / f"{FILE}.part"
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(directory / FILE)


def check(directory: epath.Path) -> None:
    """Returns if every sealed file is as it was; at once for a data set without seals.

    Raises:
      SetupError: a file is missing or is another one, or the seals cannot be read.
    """
    path = directory / FILE
    if not path.exists():
        return
    try:
        wanted = json.loads(path.read_text())
        if not isinstance(wanted, dict) or not wanted or set(map(type, wanted.values())) != {str}:
            raise ValueError("it is no object of texts")
        strange = [name for name in wanted if epath.Path(name).name != name]
        if strange:
            raise ValueError(f"it names {strange[0]!r}, which is not in the directory")
    except (OSError, ValueError, RecursionError) as error:
        raise SetupError(
            f"{path} cannot be used: {error}. Prepare the data set again, or remove this file to "
            f"train without its checks."
        ) from None
    paths = [directory / name for name in wanted]
    wrong = [
        f"{path.name} {'is missing' if found is None else f'is {found}, expected {seal}'}"
        for path, found, seal in zip(paths, _each(paths), wanted.values(), strict=True)
        if found != seal
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise SetupError(
            f"The data set in {directory} is not as data.prepare wrote it: {'; '.join(wrong[:3])}"
            f"{more} (size and checksum, by {FILE}). Copy it again or prepare it again; if the "
            f"change was meant, remove {FILE}."
        )


@functools.cache  # a process looks once
def check_shards(directory: str, shards: tuple[tuple[str, int], ...]) -> None:
    """Raises SetupError unless the files are whole, in place and of as many records as told.

    Ids count on it: with one record more or less in a file, those behind it would move.
    """
    check(epath.Path(directory))

    def fault(shard: tuple[str, int]) -> str:
        path, expected = shard
        if epath.Path(path).parent != epath.Path(directory):
            return f"{path} is not in the directory"
        try:
            found = readers.count(path)
        except FileNotFoundError:
            return f"{epath.Path(path).name} is missing"
        except ValueError as error:
            return f"{epath.Path(path).name} {error}"
        told = f"{epath.Path(path).name} has {found} records, dataset_info.json says {expected}"
        return "" if found == expected else told

    with _pool() as pool:
        wrong = next(filter(None, pool.map(fault, shards)), None)
    if wrong:
        raise SetupError(
            f"The data set in {directory} is damaged: {wrong}. Copy it again from where it came, "
            f"or remove the directory and prepare it again."
        )


def _each(paths: list[epath.Path]) -> list[str | None]:
    """The seal of each file; None for one that is not there."""

    def one(path: epath.Path) -> str | None:
        try:
            return seal(path)
        except FileNotFoundError:
            return None

    with _pool() as pool:
        return list(pool.map(one, paths))


def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(64, readers.most_open()))
