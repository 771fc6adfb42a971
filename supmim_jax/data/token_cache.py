"""Tokens of every view of every training image, computed once: ArrayRecord shards of uint16 ids.

A cache is a directory with `manifest.json` (what the tokens are of: its fingerprint) and
`tokens-00000-of-00012.arrayrecord` ... Record v * examples + i holds view v of example i: uint16
ids in row order, little-endian. A shard appears under its name when it is complete.
"""

import concurrent.futures
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from array_record.python import array_record_module
from etils import epath

from supmim_jax.config import Config, SetupError
from supmim_jax.configdict import differences, section
from supmim_jax.data import records

VERSION = 1  # goes up when the same config gives other crops or tokens
MANIFEST = "manifest.json"
# Records are read one by one in random order. A read costs time for each group of its file and for
# each record of its group: 16 and shards of 65536 are near the optimum (bench tokens).
WRITER = "group_size:16,zstd"
RECORDS_PER_SHARD = 2**16
GEOMETRY = ("image_size", "channels", "crop", "min_crop_area", "resize", "flip")
RANDOM_GEOMETRY = ("augment_layers", "augment_magnitude")  # of rand_augment alone


def fingerprint(cfg: Config, tokenizer_digest: str) -> dict:
    """All that tokens depend on, as nested plain values; two runs may share a cache if equal."""
    data = section(cfg.data)
    moves = data["augment"] == "rand_augment"
    geometry = {name: data[name] for name in GEOMETRY + (RANDOM_GEOMETRY if moves else ())}
    if data["crop"] == "contrastive":  # with boxes "centre"; the others move while a run learns
        geometry["contrastive_crop"] = {"alpha": data["contrastive_crop"]["alpha"]}
    tokenizer = section(cfg.objective.target)
    del tokenizer["path"]
    found = {
        "version": VERSION,
        "seed": cfg.seed,
        "data": {name: data[name] for name in ("name", "train_split", "train_examples")}
        | {"version": records.version(cfg.data)},
        "augmentation": geometry | {"rand_augment": moves},
        "model": {"patch": cfg.model.patch},
        "tokenizer": tokenizer,
        "tokenizer_sha256": tokenizer_digest,
    }
    return json.loads(json.dumps(found))  # as it reads in the manifest: lists, not tuples


@dataclass(frozen=True)
class Plan:
    """What a cache consists of; `manifest.json` is this."""

    fingerprint: dict
    views: int
    examples: int
    tokens: int  # per view of an image
    codes: int
    records_per_shard: int

    @property
    def records(self) -> int:
        return self.views * self.examples

    @property
    def shards(self) -> int:
        return -(-self.records // self.records_per_shard)

    def shard(self, index: int) -> range:
        """The records of a shard."""
        start = index * self.records_per_shard
        return range(start, min(start + self.records_per_shard, self.records))

    def path(self, directory: epath.Path, index: int) -> epath.Path:
        return directory / f"tokens-{index:05d}-of-{self.shards:05d}.arrayrecord"


def read_plan(directory: epath.Path) -> Plan:
    """The plan of a cache.

    Raises:
      SetupError: there is none, or it cannot be read.
    """
    path = directory / MANIFEST
    try:
        return Plan(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise SetupError(
            f"There is no token cache in {directory}: {MANIFEST} is missing. Write one with "
            f"`python -m supmim_jax.tokenize --config ... --epochs ... --cache {directory}`."
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise SetupError(f"{path} cannot be read: {error}. Write the cache again.") from None


def check_same(stored: dict, wanted: dict, directory: epath.Path) -> None:
    """Raises SetupError, naming each difference, unless both fingerprints are equal."""
    changed = differences(stored, wanted, "tokens")
    if changed:
        raise SetupError(
            f"The token cache {directory} belongs to another run: {'; '.join(changed)} (there; "
            f"here). Write a cache for this config with `python -m supmim_jax.tokenize`, or leave "
            f"config.tokens.cache empty."
        )


def write_shard(path: epath.Path, rows: Iterator[np.ndarray]) -> None:
    """Writes uint16 arrays as one shard, under its name when it is complete."""
    part = path.with_suffix(".part")
    writer = array_record_module.ArrayRecordWriter(str(part), WRITER)
    for row in rows:
        writer.write(row.astype("<u2").tobytes())
    writer.close()
    part.replace(path)


class TokenCache:
    """cache[view, id] -> uint16 ids; travels to worker processes, which open their own readers."""

    def __init__(self, directory: epath.Path, plan: Plan):
        self.directory, self.plan = directory, plan
        self.readers: dict[int, array_record_module.ArrayRecordReader] = {}
        self.lock = threading.Lock()

    def __getstate__(self) -> tuple[epath.Path, Plan]:
        return self.directory, self.plan

    def __setstate__(self, state: tuple[epath.Path, Plan]) -> None:
        self.__init__(*state)

    def __getitem__(self, at: tuple[int, int]) -> np.ndarray:
        """uint16 L.

        Raises:
          SetupError: the record cannot be read, or isn't ids of the tokenizer.
        """
        view, example = at
        record = view * self.plan.examples + example
        shard, place = divmod(record, self.plan.records_per_shard)
        path = self.plan.path(self.directory, shard)
        try:
            ids = np.frombuffer(self._reader(shard, path).read([place])[0], "<u2")
        except (RuntimeError, ValueError, IndexError) as error:
            raise SetupError(
                f"{path} cannot be read: {error}. Delete it and run supmim_jax.tokenize again: it "
                f"writes what is missing."
            ) from None
        if ids.shape != (self.plan.tokens,) or ids.max() >= self.plan.codes:
            raise SetupError(
                f"{path}: view {view} of example {example} has {ids.size} ids up to "
                f"{ids.max(initial=0)}; expected {self.plan.tokens}, each below {self.plan.codes}. "
                f"Delete it and run supmim_jax.tokenize again."
            )
        return ids

    def _reader(self, shard: int, path: epath.Path) -> array_record_module.ArrayRecordReader:
        with self.lock:
            if shard not in self.readers:
                self.readers[shard] = _reader(path)
            return self.readers[shard]


def open_cache(cfg: Config, tokenizer_digest: str | None = None) -> TokenCache:
    """The cache that config.tokens names, every shard of it.

    Args:
      cfg: the run; its seed, crops, data and tokenizer must be those of the cache.
      tokenizer_digest: of the tokenizer's arrays, where they are at hand.

    Raises:
      SetupError: it belongs to another run, has too few views, or a shard is missing or cut.
    """
    directory = epath.Path(cfg.tokens.cache)
    plan = read_plan(directory)
    digest = tokenizer_digest or plan.fingerprint["tokenizer_sha256"]
    check_same(plan.fingerprint, fingerprint(cfg, digest), directory)
    if plan.views < cfg.num_views:
        raise SetupError(
            f"The token cache {directory} has {plan.views} views of each image, and the run wants "
            f"{cfg.num_views}. Set config.tokens.views={plan.views} to cycle through them, or "
            f"write {cfg.num_views} into another directory: `python -m supmim_jax.tokenize "
            f"--epochs {cfg.num_views} --cache <directory>`."
        )
    _check_shards(directory, plan)
    return TokenCache(directory, plan)


def _check_shards(directory: epath.Path, plan: Plan) -> None:
    """Raises SetupError unless every shard is there with all its records."""
    paths = [plan.path(directory, i) for i in range(plan.shards)]
    there = {path.name for path in directory.iterdir()}
    missing = [path.name for path in paths if path.name not in there]
    if missing:
        raise SetupError(
            f"The token cache {directory} lacks {len(missing)} of {plan.shards} shards: "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}. Run the command that "
            f"wrote it again: it goes on where it stopped."
        )
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        found = pool.map(_damage, paths, [len(plan.shard(i)) for i in range(plan.shards)])
        damage = next(filter(None, found), None)
    if damage:
        raise SetupError(
            f"The token cache {directory} is damaged: {damage}. Delete that file and run "
            f"supmim_jax.tokenize again: it writes what is missing."
        )


def _damage(path: epath.Path, expected: int) -> str:
    """What is wrong with a shard; "" for nothing. Only its end is read."""
    try:
        found = _reader(path).num_records()
    except (RuntimeError, ValueError) as error:
        return f"{path.name} is cut or not an ArrayRecord file ({str(error)[:200]})"
    return "" if found == expected else f"{path.name} has {found} records, expected {expected}"


def _reader(path: epath.Path) -> array_record_module.ArrayRecordReader:
    return array_record_module.ArrayRecordReader(str(path), options="readahead_buffer_size:0")
