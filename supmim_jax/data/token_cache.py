"""Tokens of every view of every training image, computed once: ArrayRecord shards of uint16 ids.

A cache is a directory with `manifest.json` (what the tokens are of: its fingerprint) and
`tokens-00000-of-00012.arrayrecord` ... Record v * examples + i holds view v of example i: uint16
ids in row order, little-endian. A shard appears under its name when it is complete.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from array_record.python import array_record_module
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from supmim_jax.config import Config, SetupError
from supmim_jax.configdict import differences, section

VERSION = 1  # goes up when the same config gives other crops or tokens
MANIFEST = "manifest.json"
WRITER = "group_size:1,zstd"  # read one by one, in random order
GEOMETRY = ("image_size", "channels", "crop", "min_crop_area", "flip")
RANDOM_GEOMETRY = ("augment_layers", "augment_magnitude")  # of rand_augment alone


def fingerprint(cfg: Config, tokenizer_digest: str) -> dict:
    """All that tokens depend on, as nested plain values; two runs may share a cache if equal."""
    data = section(cfg.data)
    moves = data["augment"] == "rand_augment"
    geometry = {name: data[name] for name in GEOMETRY + (RANDOM_GEOMETRY if moves else ())}
    tokenizer = section(cfg.objective.target)
    del tokenizer["path"]
    found = {
        "version": VERSION,
        "seed": cfg.seed,
        "data": {name: data[name] for name in ("name", "train_split", "train_examples")},
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
        self.source = _open(directory, plan)

    def __len__(self) -> int:
        return self.plan.records

    def __getitem__(self, at: tuple[int, int]) -> np.ndarray:
        """uint16 L.

        Raises:
          SetupError: the record cannot be read, or isn't ids of the tokenizer.
        """
        view, example = at
        record = view * self.plan.examples + example
        path = self.plan.path(self.directory, record // self.plan.records_per_shard)
        try:
            ids = np.frombuffer(self.source[record], "<u2")
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
            f"write more with `python -m supmim_jax.tokenize --epochs {cfg.num_views}`."
        )
    return TokenCache(directory, plan)


def _open(directory: epath.Path, plan: Plan) -> ArrayRecordDataSource:
    paths = [plan.path(directory, i) for i in range(plan.shards)]
    there = {path.name for path in directory.iterdir()}
    missing = [path.name for path in paths if path.name not in there]
    if missing:
        raise SetupError(
            f"The token cache {directory} lacks {len(missing)} of {plan.shards} shards: "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}. Run the command that "
            f"wrote it again: it goes on where it stopped."
        )
    try:
        source = ArrayRecordDataSource([str(path) for path in paths])
    except (RuntimeError, ValueError) as error:
        source, reason = None, str(error)
    if source is None or len(source) != plan.records:
        raise SetupError(
            f"The token cache {directory} is damaged: "
            f"{_damaged(paths, plan) or reason}. Delete that file and run supmim_jax.tokenize "
            f"again: it writes what is missing."
        )
    return source


def _damaged(paths: list[epath.Path], plan: Plan) -> str:
    """The first shard that does not hold its records, and what it holds."""
    for index, path in enumerate(paths):
        try:
            found = len(ArrayRecordDataSource([str(path)]))
        except (RuntimeError, ValueError) as error:
            return f"{path.name} is cut or not an ArrayRecord file ({str(error)[:200]})"
        if found != len(plan.shard(index)):
            return f"{path.name} has {found} records, expected {len(plan.shard(index))}"
    return ""
