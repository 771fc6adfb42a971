"""Tokens of every view of every training image, computed once: ArrayRecord shards of packed ids.

A cache is a directory with `manifest.json`, the fingerprint of what the tokens belong to, and
`tokens-00000-of-00012.arrayrecord` and so on. Record v * examples + i holds view v of example i:
the ids in row order, each in as many bits as the codes need (10 for 1024 codes), and a CRC-32, all
little-endian. Earlier versions took 16 bits for each id. The checksum covers the ids, the cache,
the number of the record and the image's file. So tokens that were swapped, or whose images changed,
are noticed when they are read. A shard gets its name once it is complete.
"""

import dataclasses
import hashlib
import json
import re
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from array_record.python import array_record_module
from etils import epath

from supmim_jax import storage
from supmim_jax.config import Config
from supmim_jax.config.configdict import differences, section
from supmim_jax.data import decode, source
from supmim_jax.errors import SetupError

MANIFEST = "manifest.json"
VERSION = 2  # goes up when the same config gives other crops or tokens
# Records are read one by one in random order. A read costs time for each group of its file and for
# each record of its group: 32 and shards of 65536 are near the optimum (bench tokens). Packed ids
# leave nothing to compress, and unpacking a group would take longer than reading it.
WRITER = "group_size:32,uncompressed"
RECORDS_PER_SHARD = 2**16
POWERS = 2 ** np.arange(16, dtype=np.uint16)
GEOMETRY = ("image_size", "channels", "crop", "min_crop_area", "resize", "flip")
# How images are shown that are transparent or have more than 8 bits. Caches of versions that did
# not look at that have no such part, and are right for images that are neither.
SHOWN = ("background", "max_value")
RANDOM_GEOMETRY = ("augment", "augment_layers", "augment_magnitude")  # where it moves pixels
# What a person knows the parts of a fingerprint as.
KNOWN_AS = {
    r"tokens\.data\.version": "version of the data set",
    r"tokens\.augmentation\.rand_augment": "config.data.augment moves pixels",
    r"tokens\.(augmentation|shown|data)\.": "config.data.",
    r"tokens\.tokenizer\.": "config.objective.target.",
    r"tokens\.(model\.|seed)": r"config.\1",
    r"tokens\.tokenizer_sha256": "SHA-256 of the tokenizer",
}
AGAIN = "run supmim_jax.cache_tokens again: it writes what is missing."


@dataclass(frozen=True)
class Plan:
    """What a cache consists of; `manifest.json` is this and its SHA-256."""

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
    def bits(self) -> int:
        """Bits of an id."""
        return max(1, (self.codes - 1).bit_length())

    @property
    def shards(self) -> int:
        return -(-self.records // self.records_per_shard)

    def shard(self, index: int) -> range:
        """The records of a shard."""
        start = index * self.records_per_shard
        return range(start, min(start + self.records_per_shard, self.records))

    @property
    def digest(self) -> str:
        """SHA-256 of the whole plan, which identifies the cache."""
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()

    @property
    def manifest(self) -> dict:
        return dataclasses.asdict(self) | {"sha256": self.digest}

    def path(self, directory: epath.Path, index: int) -> epath.Path:
        return directory / f"tokens-{index:05d}-of-{self.shards:05d}.arrayrecord"


def read_plan(directory: epath.Path) -> Plan:
    """The plan of a cache; raises SetupError if there is none, or it cannot be read."""
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_text())
        stored = values.pop("sha256", "missing, as in those of earlier versions of this code")
        plan = Plan(**values)
        if stored != plan.digest:
            raise ValueError(f"its checksum is {stored}, expected {plan.digest}")
        return plan
    except FileNotFoundError:
        raise SetupError(
            f"There is no token cache in {directory}: {MANIFEST} is missing. Write one with "
            f"`python -m supmim_jax.cache_tokens --config ... --epochs ... --cache {directory}`."
        ) from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SetupError(f"{path} cannot be read: {error}. Write the cache again.") from None


def fingerprint(cfg: Config, tokenizer_digest: str, data_version: str) -> dict:
    """Everything that tokens depend on, as plain values; runs with equal ones share a cache."""
    data = section(cfg.data)
    moves = cfg.data.moves_pixels
    geometry = {name: data[name] for name in GEOMETRY + (RANDOM_GEOMETRY if moves else ())}
    if data["crop"] == "contrastive":  # with boxes "centre"; the others move while a run learns
        geometry["contrastive_crop"] = {"alpha": data["contrastive_crop"]["alpha"]}
    tokenizer = section(cfg.objective.target)
    del tokenizer["path"]
    shown = {name: data[name] for name in SHOWN}
    found = {
        "version": VERSION,
        "seed": cfg.seed,
        "data": {name: data[name] for name in ("name", "train_split", "train_examples")}
        | {"version": data_version},
        "shown": shown,
        "augmentation": geometry | {"rand_augment": moves},
        "model": {"patch": cfg.model.patch},
        "tokenizer": tokenizer,
        "tokenizer_sha256": tokenizer_digest,
    }
    return json.loads(json.dumps(found))  # as it reads in the manifest: lists, not tuples


def check_same(stored: dict, wanted: dict, directory: epath.Path) -> None:
    """Raises SetupError, naming each difference, unless both fingerprints are equal."""
    if changed := "; ".join(differences(stored, wanted, "tokens")):
        for part, known in KNOWN_AS.items():
            changed = re.sub(part, known, changed)
        raise SetupError(
            f"The token cache {directory} belongs to another run: {changed} (there; "
            f"here). Write one for this config with `python -m supmim_jax.cache_tokens`, or leave "
            f"config.tokens.cache empty."
        )


def write_shard(
    directory: epath.Path, plan: Plan, index: int, rows: Iterable[tuple[np.ndarray, int]]
) -> None:
    """Writes a shard from the ids of each record and the mark of its image (`source.mark`)."""
    digest = bytes.fromhex(plan.digest)
    with storage.written(plan.path(directory, index)) as part:
        writer = array_record_module.ArrayRecordWriter(str(part), WRITER)
        for record, (ids, mark) in zip(plan.shard(index), rows, strict=True):
            encoded = packed(ids, plan.bits)
            writer.write(encoded + _checksum(digest, record, mark, encoded))
        writer.close()


def packed(ids: np.ndarray, bits: int) -> bytes:
    """The lowest `bits` bits of each id, the lowest first."""
    return np.packbits(ids[:, None] >> np.arange(bits) & 1, bitorder="little").tobytes()


def unpacked(encoded: bytes, bits: int, count: int) -> np.ndarray:
    """The `count` ids that `packed` was given, uint16."""
    each = np.unpackbits(np.frombuffer(encoded, np.uint8), count=count * bits, bitorder="little")
    return each.reshape(count, bits) @ POWERS[:bits]


def _checksum(digest: bytes, record: int, mark: int, ids: bytes) -> bytes:
    """CRC-32 of a record's ids and of what they belong to: cache, record, image."""
    of = zlib.crc32(digest + struct.pack("<QI", record, mark))
    return struct.pack("<I", zlib.crc32(ids, of))


class TokenCache:
    """Reads ids; can be pickled to worker processes, which open their own readers."""

    def __init__(self, directory: epath.Path, plan: Plan):
        self.directory, self.plan, self.digest = directory, plan, bytes.fromhex(plan.digest)
        self.plain_alone = "shown" not in plan.fingerprint
        self.readers = source.Readers([str(plan.path(directory, i)) for i in range(plan.shards)])

    @classmethod
    def open(cls, cfg: Config, data_version: str) -> "TokenCache":
        """The cache that config.tokens names, every shard of it.

        Its seed, crops, data and tokenizer must be those of `cfg`, and the version of the prepared
        data set that which is given; of the tokenizer's arrays, see `check_tokenizer`.

        Raises:
          SetupError: it belongs to another run, has too few views, or a shard is missing or cut.
        """
        directory = epath.Path(cfg.tokens.cache)
        cache = cls(directory, read_plan(directory))
        wanted = fingerprint(cfg, cache.tokenizer_digest, data_version)
        if cache.plain_alone:
            del wanted["shown"]
        check_same(cache.plan.fingerprint, wanted, directory)
        if cache.plan.views < cfg.num_views:
            raise SetupError(
                f"The token cache {directory} has {cache.plan.views} views of each image, and the "
                f"run wants {cfg.num_views}. Set config.tokens.views={cache.plan.views} to cycle "
                f"through them, or write another with supmim_jax.cache_tokens --epochs "
                f"{cfg.num_views}."
            )
        shards = range(cache.plan.shards)
        counts = {cache.plan.path(directory, i).name: len(cache.plan.shard(i)) for i in shards}
        if wrong := source.damage(directory, counts):
            raise SetupError(
                f"The token cache {directory} is damaged or not complete: {wrong}. Delete what is "
                f"damaged, and {AGAIN}"
            )
        return cache

    @property
    def tokenizer_digest(self) -> str:
        """SHA-256 of the arrays of the tokenizer that made it."""
        return self.plan.fingerprint["tokenizer_sha256"]

    def check_tokenizer(self, digest: str, what: str) -> None:
        """Raises SetupError unless the tokenizer of this digest made the cache; `what` names it."""
        if digest != self.tokenizer_digest:
            raise SetupError(
                f"{what} is not the tokenizer that made the token cache {self.directory}: its "
                f"SHA-256 is {digest[:12]}..., and the cache's is {self.tokenizer_digest[:12]}... "
                f"Name that tokenizer, copy the cache again, or write another one."
            )

    def __reduce__(self) -> tuple:
        return TokenCache, (self.directory, self.plan)

    def read(self, view: int, example: int, image: bytes) -> np.ndarray:
        """The ids of a view of an example, uint16 L; `image` is its record's, encoded.

        Raises:
          SetupError: the record cannot be read, or its checksum is of something else.
        """
        if self.plain_alone and not decode.read(image).plain:
            raise SetupError(
                f"The token cache {self.directory} is of a version that did not look at "
                f"transparency or at more than 8 bits a channel, and example {example} has one of "
                f"these. Write another cache with supmim_jax.cache_tokens."
            )
        record = view * self.plan.examples + example
        shard, place = divmod(record, self.plan.records_per_shard)
        try:
            found = self.readers.read(shard, place)
        except (RuntimeError, ValueError, IndexError) as error:
            path = self.plan.path(self.directory, shard)
            raise SetupError(f"{path} cannot be read: {error}. Delete it and {AGAIN}") from None
        encoded, stored = found[:-4], found[-4:]
        if stored != _checksum(self.digest, record, source.mark(image), encoded):
            path = self.plan.path(self.directory, shard)
            raise SetupError(
                f"{path}: the checksum of view {view} of example {example} is wrong. The file is "
                f"damaged or of another place or cache, or this image is no longer the one that "
                f"was tokenised: then write another cache. Else delete the file and {AGAIN}"
            )
        count = self.plan.tokens
        bits = 16 if len(encoded) == 2 * count else self.plan.bits  # 16: of earlier versions
        return unpacked(encoded, bits, count)
