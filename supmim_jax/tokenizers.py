"""Where a run's frozen arrays come from: a file, a checkpoint, or a fit on the training split."""

import hashlib
import json
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from supmim_jax import checkpoint, encoder
from supmim_jax.config import Config
from supmim_jax.config.configdict import differences, section
from supmim_jax.data import loader, token_cache
from supmim_jax.errors import SetupError
from supmim_jax.metrics import write_json
from supmim_jax.models import kmeans, maskgit

FILE = "tokenizer.npz"  # a fitted codebook, kept in the workdir and in token caches
IDENTITY = "tokenizer.json"  # which tokenizer a run began with
IN_FILE_ONLY = ("config.objective.target.path", "config.objective.target.precision")


def arrays(cfg: Config, workdir: epath.Path, like: dict) -> dict:
    """The `frozen` argument of the train step as host arrays; {} where nothing is frozen.

    Args:
      cfg: the run.
      workdir: where a codebook that was fitted is kept, see `save`.
      like: the abstract `frozen` of the program.

    Raises:
      SetupError: a file named in the config is missing or doesn't fit.
    """
    found = {}
    if "target" in like:
        found["target"] = {"tokenizer": tokenizer(cfg, workdir, like["target"]["tokenizer"])}
    if "perceptual" in like:
        directory = checkpoint.locate(cfg.objective.perceptual.checkpoint)
        tree = {"encoder": like["perceptual"]}
        found["perceptual"] = _host(checkpoint.restore_params(directory, tree)["encoder"])
    return found


def tokenizer(cfg: Config, workdir: epath.Path, like: dict) -> dict:
    """The arrays of the target's tokenizer, whether or not a cache spares the step from it.

    A codebook without a file is fitted once, on the training split alone; it is looked for in the
    token cache and in the workdir first.

    Raises:
      SetupError: the file is missing or is not that of config.objective.target.
    """
    target = cfg.objective.target
    if target.name == "vqgan":
        return _vqgan(cfg, like)
    found = _codebook(cfg, workdir) if jax.process_index() == 0 else _zeros(like)
    if jax.process_count() > 1:  # one process's fit, to the last bit, everywhere
        found = _host(multihost_utils.broadcast_one_to_all(found))
    return found


def _codebook(cfg: Config, workdir: epath.Path) -> dict:
    target = cfg.objective.target
    kept = [epath.Path(d) / FILE for d in (cfg.tokens.cache, workdir) if d]
    path = epath.Path(target.path) if target.path else next(filter(_exists, kept), None)
    if path:
        found = kmeans.load(path, target, cfg.model.patch, cfg.data.channels)
        if cfg.tokens.cache and not target.path and path == kept[0]:
            _check_made(found, cfg.tokens.cache)
        return found
    images = loader.first_images(cfg, target.fit_images)
    return kmeans.fit(target, cfg.model.patch, images, cfg.seed)


def _check_made(codebook: dict, cache: str) -> None:
    """Raises SetupError unless the codebook in a token cache is the one that it was made with."""
    wanted = token_cache.read_plan(epath.Path(cache)).fingerprint["tokenizer_sha256"]
    if digest(codebook) != wanted:
        raise SetupError(
            f"{epath.Path(cache) / FILE} is not the codebook that this token cache was made with, "
            f"of SHA-256 {wanted[:12]}... Copy the cache again, or write another one."
        )


def save(arrays: dict, cfg: Config, workdir: epath.Path) -> None:
    """Keeps with the run which tokenizer it has, and a codebook that was fitted."""
    if "target" in arrays and cfg.objective.target.name == "patch_codes":
        kmeans.save(workdir / FILE, arrays["target"]["tokenizer"])
    if cfg.has_tokens:
        write_json(workdir / IDENTITY, {"sha256": identity(arrays, cfg)})


def check_kept(arrays: dict, cfg: Config, workdir: epath.Path) -> None:
    """Raises SetupError if the run in workdir began with another tokenizer."""
    path = workdir / IDENTITY
    if cfg.has_tokens and path.exists():
        try:
            kept = str(json.loads(path.read_text())["sha256"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise SetupError(
                f"{path} cannot be read: {error!r}. It says which tokenizer the run began with: "
                f"copy it again, or choose another --workdir."
            ) from None
        here = identity(arrays, cfg)
        if kept != here:
            raise SetupError(
                f"--workdir {workdir} holds a run with the tokenizer of SHA-256 {kept[:12]}..., "
                f"and config.objective.target or config.tokens.cache now gives {here[:12]}... Name "
                f"the one that it began with, or choose another --workdir."
            )


def identity(arrays: dict, cfg: Config) -> str:
    """SHA-256 of the tokenizer's arrays, which a cache knows of those that made it."""
    if cfg.tokens.cache:
        plan = token_cache.read_plan(epath.Path(cfg.tokens.cache))
        return plan.fingerprint["tokenizer_sha256"]
    return digest(arrays["target"]["tokenizer"])


def digest(arrays: dict) -> str:
    """SHA-256 of names, shapes and values, the same however the arrays were stored."""
    found = hashlib.sha256()
    for name, x in sorted(traverse_util.flatten_dict(arrays, sep="/").items()):
        x = np.ascontiguousarray(x, np.float32)
        found.update(f"{name}{x.shape}".encode() + x.tobytes())
    return found.hexdigest()


def digests(arrays: dict) -> dict[str, str]:
    """SHA-256 of each part of a run's frozen arrays."""
    return {name: digest(part) for name, part in arrays.items()}


def check_cache(cfg: Config, workdir: epath.Path, mesh: Mesh) -> None:
    """Raises SetupError unless the token cache was made with the tokenizer that the config names.

    Where the config names no file (a codebook that is fitted), there is nothing to compare.
    """
    if cfg.tokens.cache and cfg.objective.target.path:
        like = encoder.build_tokenizer(cfg, mesh.size, mesh).arrays
        token_cache.open_cache(cfg, digest(tokenizer(cfg, workdir, like)))


def _vqgan(cfg: Config, like: dict) -> dict:
    path = cfg.objective.target.path
    if not path:
        raise SetupError(
            "config.objective.target.path is empty: give MaskGIT's tokenizer_imagenet256_checkpoint"
            ", or the --workdir of a run of a tokenizer (configs/vqgan_*.py)."
        )
    if not epath.Path(checkpoint.split_step(path)[0]).is_dir():
        return maskgit.load(epath.Path(path), cfg.objective.target, like)
    directory = checkpoint.locate(path)
    run = checkpoint.read_config(directory)
    if run.objective.name != "vqgan":
        raise SetupError(f"{path} is a {run.objective.name!r} run, and no tokenizer of images.")
    trained = section(run.objective.tokenizer)
    changed = [
        difference
        for difference in differences(
            trained, section(cfg.objective.target), "config.objective.target"
        )
        if not difference.startswith(IN_FILE_ONLY)
    ]
    if changed:
        raise SetupError(f"{path} is another tokenizer: {'; '.join(changed)} (there; here).")
    return _host(checkpoint.restore_params(directory, {"tokenizer": like})["tokenizer"])


def _host(tree: Any) -> dict:
    return jax.tree.map(np.asarray, tree)


def _zeros(like: dict) -> dict:
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)


def _exists(path: epath.Path) -> bool:
    return path.exists()
