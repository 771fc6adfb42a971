"""What a token cache consists of: `manifest.json`."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from etils import epath

from supmim_jax.config import SetupError

MANIFEST = "manifest.json"


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
    def shards(self) -> int:
        return -(-self.records // self.records_per_shard)

    def shard(self, index: int) -> range:
        """The records of a shard."""
        start = index * self.records_per_shard
        return range(start, min(start + self.records_per_shard, self.records))

    @property
    def digest(self) -> str:
        """SHA-256 of all this: what tells one cache from another."""
        return _digest(dataclasses.asdict(self))

    @property
    def manifest(self) -> dict:
        return dataclasses.asdict(self) | {"sha256": self.digest}

    def path(self, directory: epath.Path, index: int) -> epath.Path:
        return directory / f"tokens-{index:05d}-of-{self.shards:05d}.arrayrecord"


def read_plan(directory: epath.Path) -> Plan:
    """The plan of a cache.

    Raises:
      SetupError: there is none, or it cannot be read.
    """
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_text())
        stored = values.pop("sha256", None)
        if stored is None:
            raise ValueError("it has no checksum, as those of earlier versions of this code")
        if stored != _digest(values):
            raise ValueError("its checksum is wrong: it was changed after it was written")
        return Plan(**values)
    except FileNotFoundError:
        raise SetupError(
            f"There is no token cache in {directory}: {MANIFEST} is missing. Write one with "
            f"`python -m supmim_jax.tokenize --config ... --epochs ... --cache {directory}`."
        ) from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise SetupError(f"{path} cannot be read: {error}. Write the cache again.") from None


def _digest(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
