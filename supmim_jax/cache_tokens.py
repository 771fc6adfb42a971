"""Computes a run's image tokens once, before training: a cache that training reads.

  python -m supmim_jax.cache_tokens --config configs/supmim_b14_imagenet1k.py --epochs 300 \\
      --cache /data/tokens --config.objective.target.path=tokenizer_imagenet256_checkpoint

Then train with --config.tokens.cache=/data/tokens; a run of more epochs cycles through the views
with --config.tokens.views=300. Run again, the command continues with the missing shards. Several
processes (--distributed) share them.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from absl import flags
from etils import epath
from tqdm import tqdm

from supmim_jax import cli, encoder, sharding, storage, tokenizers
from supmim_jax.config import Config, MeshConfig, TokensConfig
from supmim_jax.config.configdict import from_configdict
from supmim_jax.data import token_cache
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import ConfigError, SetupError

# The checksum and ArrayRecord's own bytes for each record, and its own for each shard: upper
# bounds, which hold for shards of few records, too.
RECORD_BYTES, SHARD_BYTES = 70, 2**17


def tokenize(
    cfg: Config,
    directory: epath.Path,
    views: int,
    records_per_shard: int = token_cache.RECORDS_PER_SHARD,
) -> token_cache.Plan:
    """Writes this process's missing shards of the cache, on its own devices.

    Views are the crops of the run's epochs 0, 1, ...; a restart may lose a shard of each process.

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
    digest = tokenizers.digest(arrays)
    plan = token_cache.Plan(
        fingerprint=token_cache.fingerprint(cfg, digest, dataset.source.version),
        views=views,
        examples=cfg.data.train_examples,
        tokens=(cfg.data.image_size // cfg.model.patch) ** 2,
        codes=prog.num_codes,
        records_per_shard=records_per_shard,
    )
    _begin(directory, plan, cfg, arrays)
    own = range(jax.process_index(), plan.shards, jax.process_count())
    missing = [i for i in own if not plan.path(directory, i).exists()]
    total = sum(len(plan.shard(i)) for i in missing)
    print(
        f"{directory}: {plan.views} views of {plan.examples} images, {plan.tokens} tokens each of "
        f"{plan.codes}; {plan.shards} shards, at most {estimated_bytes(plan) / 1e9:.3f} GB. To do "
        f"here: {len(missing)} shards, {total} views.",
        file=sys.stderr,
    )
    bound = prog.bind({"tokenizer": sharding.put(arrays, prog.arrays)})
    layout = jax.NamedSharding(mesh, sharding.BATCH)

    def encoded(batch: dict[str, np.ndarray]) -> tuple[jax.Array, np.ndarray]:
        """The ids of a batch, padding included, still being computed; and its images' marks."""
        padding = batch_size - len(batch["mark"])
        images = np.pad(batch["image"], ((0, padding), (0, 0), (0, 0), (0, 0)))
        return bound.encode(jax.device_put(images, layout)), batch["mark"]

    every = 1.0 if sys.stderr.isatty() else 30.0  # seconds between lines of a log
    with tqdm(total=total, unit="view", mininterval=every, file=sys.stderr) as progress:
        for index in missing:
            batches = dataset.target_images(plan.shard(index), batch_size)
            rows = _rows(map(encoded, batches), progress)
            token_cache.write_shard(directory, plan, index, rows)
    return plan


def _rows(
    batches: Iterable[tuple[jax.Array, np.ndarray]], progress: tqdm
) -> Iterator[tuple[np.ndarray, int]]:
    """uint16 ids L of each record, and the mark of its image.

    The next batch is under way while one is handed out.
    """
    for (ids, marks), _ in itertools.pairwise(itertools.chain(batches, [None])):
        yield from zip(np.asarray(ids).astype(np.uint16), marks.tolist())  # padding has no mark
        progress.update(len(marks))


def _begin(directory: epath.Path, plan: token_cache.Plan, cfg: Config, arrays: dict) -> None:
    """Makes the directory with its manifest, or checks that it belongs to this plan."""
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
    cure = "Choose another --cache, or fewer --epochs: config.tokens.views cycles them."
    try:
        storage.make_directory(directory)
        storage.check_disk_space(directory, estimated_bytes(plan), "the whole cache", cure)
        if jax.process_index() == 0:
            tokenizers.save_fitted(cfg, arrays, directory)
            storage.write_json(manifest, plan.manifest)
    except OSError as error:
        raise SetupError(
            f"--cache {directory} cannot be written: {error}. Choose another one."
        ) from None


def estimated_bytes(plan: token_cache.Plan) -> int:
    """An upper bound of the cache's size."""
    ids = math.ceil(plan.tokens * plan.bits / 8)
    return plan.records * (ids + RECORD_BYTES) + plan.shards * SHARD_BYTES


def main() -> None:
    cli.join()
    cfg, directory = from_configdict(CONFIG.value), epath.Path(CACHE.value)
    cli.agree(cfg, {"cache": CACHE.value, "epochs": EPOCHS.value, "shard": SHARD.value})
    plan = tokenize(cfg, directory, EPOCHS.value, SHARD.value)
    size = sum(storage.stat(path).size for path in directory.glob("*.arrayrecord"))
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
