"""Computes a run's image tokens once, before it: a cache that training reads.

  python -m supmim_jax.cache_tokens --config configs/supmim_b14_imagenet1k.py --epochs 300 \\
      --cache /data/tokens --config.objective.target.path=tokenizer_imagenet256_checkpoint

Then train with --config.tokens.cache=/data/tokens; a run of more epochs cycles through the views
with --config.tokens.views=300. Run again, it goes on with the shards that are missing. Several
processes (--distributed) share the shards.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh

from supmim_jax import cli, encoder, sharding, storage, tokenizers
from supmim_jax.config import Config, MeshConfig, TokensConfig
from supmim_jax.config.configdict import from_configdict
from supmim_jax.data import token_cache
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import ConfigError, SetupError
from supmim_jax.metrics import write_json

# ArrayRecord's own bytes for each record, and at least for each shard. An upper bound: its
# compression saves more than that where tokens are many (bench tokens).
RECORD_BYTES, SHARD_BYTES = 70, 2**17

Row = tuple[np.ndarray, int]  # ids of a record, and the mark of its image


def tokenize(
    cfg: Config,
    directory: epath.Path,
    views: int,
    records_per_shard: int = token_cache.RECORDS_PER_SHARD,
) -> token_cache.Plan:
    """Writes this process's missing shards of the cache, on its own devices.

    Args:
      cfg: the run that the tokens are for.
      directory: of the cache; made if it isn't there.
      views: crops per image; those of epochs 0, 1, ... of the run.
      records_per_shard: what a restart may lose.

    Raises:
      SetupError: the run has no tokens, the directory holds those of another run, or is too small.
    """
    if not cfg.has_tokens:
        raise ConfigError("config.objective predicts no image tokens; there is nothing to cache.")
    # Refuses crops whose tokens cannot be computed before the run.
    dataclasses.replace(cfg, tokens=TokensConfig(cache=str(directory), views=views))
    cfg = dataclasses.replace(cfg, tokens=TokensConfig(views=views))
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices())
    batch_size = -(-cfg.eval.batch_size // mesh.size) * mesh.size
    prog = encoder.build_tokenizer(cfg, batch_size, mesh)
    dataset = Dataset.open(cfg)
    arrays = tokenizers.open_tokenizer(cfg, dataset, directory, prog.arrays)
    plan = token_cache.Plan(
        fingerprint=token_cache.fingerprint(cfg, tokenizers.digest(arrays)),
        views=views,
        examples=cfg.data.train_examples,
        tokens=(cfg.data.image_size // cfg.model.patch) ** 2,
        codes=prog.num_codes,
        records_per_shard=records_per_shard,
    )
    _begin(directory, plan, cfg, arrays)
    bound = encoder.BoundTokenizer(prog, sharding.put(arrays, prog.arrays))
    progress = Progress(plan, directory)
    for index in range(jax.process_index(), plan.shards, jax.process_count()):
        path, records = plan.path(directory, index), plan.shard(index)
        if not path.exists():
            rows = progress(encoded(bound, dataset, records, batch_size, mesh))
            token_cache.write_shard(path, token_cache.packed(plan, index, rows))
    return plan


def encoded(
    bound: encoder.BoundTokenizer, dataset: Dataset, records: range, batch_size: int, mesh: Mesh
) -> Iterator[Row]:
    """uint16 ids L of each record in turn, and the mark of its image.

    The next batch is under way while one is handed out.
    """
    rows = jax.NamedSharding(mesh, sharding.BATCH)
    pending: tuple[jax.Array, np.ndarray] | None = None
    for images, marks in dataset.target_images(records.start, records.stop, batch_size):
        count = len(images)
        padded = np.pad(images, ((0, batch_size - count), (0, 0), (0, 0), (0, 0)))
        ids = bound.encode(jax.device_put(padded, rows))
        if pending:
            yield from _rows(*pending)
        pending = ids, marks
    if pending:
        yield from _rows(*pending)


def _rows(ids: jax.Array, marks: np.ndarray) -> Iterator[Row]:
    """Those of a batch that are no padding."""
    return zip(np.asarray(ids)[: len(marks)].astype(np.uint16), marks.tolist(), strict=True)


def _begin(directory: epath.Path, plan: token_cache.Plan, cfg: Config, arrays: dict) -> None:
    """Makes the directory with its manifest, or checks that it is this plan's."""
    manifest = directory / token_cache.MANIFEST
    if manifest.exists():
        found = token_cache.read_plan(directory)
        token_cache.check_same(found.fingerprint, plan.fingerprint, directory)
        if found != plan:
            raise SetupError(
                f"The token cache {directory} has {found.views} views in shards of "
                f"{found.records_per_shard}; asked for are {plan.views} in shards of "
                f"{plan.records_per_shard}. Ask for the same, or choose another --cache."
            )
        return
    try:
        storage.make_directory(directory)
        _check_space(directory, plan)
        if jax.process_index() == 0:
            tokenizers.save_fitted(cfg, arrays, directory)
            write_json(manifest, plan.manifest)
    except OSError as error:
        raise SetupError(
            f"--cache {directory} cannot be written: {error}. Choose a directory that you own."
        ) from None


def estimated_bytes(plan: token_cache.Plan) -> int:
    """An upper bound of the cache's size."""
    return plan.records * (2 * plan.tokens + RECORD_BYTES) + plan.shards * SHARD_BYTES


def _check_space(directory: epath.Path, plan: token_cache.Plan) -> None:
    """Raises SetupError if a local disk has no room for the whole cache."""
    free, needed = storage.free_bytes(directory), estimated_bytes(plan)
    if free is not None and needed > free:
        raise SetupError(
            f"--cache {directory} needs {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} "
            f"GB free. Choose another disk, or fewer --epochs: config.tokens.views cycles them."
        )


class Progress:
    """Says what will be written, then how far it is, on stderr."""

    def __init__(self, plan: token_cache.Plan, directory: epath.Path):
        own = range(jax.process_index(), plan.shards, jax.process_count())
        missing = [i for i in own if not plan.path(directory, i).exists()]
        self.total = sum(len(plan.shard(i)) for i in missing)
        self.done, self.begin, self.shown = 0, time.monotonic(), 0.0
        self.terminal = sys.stderr.isatty()
        print(
            f"{directory}: {plan.views} views of {plan.examples} images, {plan.tokens} tokens each "
            f"of {plan.codes}; {plan.shards} shards, at most {estimated_bytes(plan) / 1e9:.3f} GB. "
            f"To do here: {len(missing)} shards, {self.total} views.",
            file=sys.stderr,
        )

    def __call__(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Passes the rows on and counts them."""
        for row in rows:
            yield row
            self.done += 1
            now = time.monotonic()
            if now - self.shown > (1.0 if self.terminal else 30.0) or self.done == self.total:
                self.shown = now
                self._show(self.done / max(now - self.begin, 1e-9))

    def _show(self, rate: float) -> None:
        minutes, seconds = divmod(round((self.total - self.done) / rate), 60)
        line = (
            f"{self.done}/{self.total} {100 * self.done // self.total:3d}% | {rate:.0f} img/s | "
            f"{minutes}:{seconds:02d} left"
        )
        end = "" if self.terminal and self.done < self.total else "\n"
        start = "\r\x1b[K" if self.terminal else ""
        print(start + line, end=end, file=sys.stderr, flush=True)


def main() -> None:
    cli.join()
    cfg, directory = from_configdict(CONFIG.value), epath.Path(CACHE.value)
    cli.agree(cfg, {"cache": CACHE.value, "epochs": EPOCHS.value, "shard": SHARD.value})
    plan = tokenize(cfg, directory, EPOCHS.value, SHARD.value)
    size = sum(path.stat().length for path in directory.glob("*.arrayrecord"))
    print(f"{directory}: {plan.records} views, {size / plan.records:.1f} bytes each.")


if __name__ == "__main__":
    CONFIG = cli.define("The run that the tokens are for.")
    CACHE = storage.define("cache", None, "Directory to write, or to go on with.")
    EPOCHS = flags.DEFINE_integer("epochs", None, "Views of each image.", lower_bound=1)
    SHARD = flags.DEFINE_integer(
        "shard", token_cache.RECORDS_PER_SHARD, "Records per shard.", lower_bound=1
    )
    cli.define_process_flags()
    flags.mark_flags_as_required(["config", "cache", "epochs"])
    cli.start(main)
