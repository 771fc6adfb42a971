"""The frozen arrays of a run: those of its tokenizer, and of the encoder in a perceptual loss.

A tokenizer comes from a file, from the checkpoint of a run that trained it, or from a fit on the
training split, which is kept in the workdir and in token caches.
"""

import hashlib
import io
from dataclasses import dataclass

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from supmim_jax import encoder, storage
from supmim_jax.checkpoint import Checkpoint, split_step
from supmim_jax.config import Config
from supmim_jax.config.configdict import differences, section
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import SetupError
from supmim_jax.models import kmeans, vqgan
from supmim_jax.train_step import TrainStep

FILE = "tokenizer.npz"  # a fitted codebook, kept in the workdir and in token caches
IDENTITY = "tokenizer.json"  # which tokenizer a run began with
IN_FILE_ONLY = ("config.objective.target.path", "config.objective.target.precision")


@dataclass(frozen=True)
class Frozen:
    """Host arrays that the train step takes beside its state and never changes."""

    arrays: dict  # the `frozen` argument of the step; {} where nothing is frozen
    identity: str  # SHA-256 of the tokenizer whose tokens are the target; "" without one

    @classmethod
    def open(
        cls, cfg: Config, dataset: Dataset, workdir: epath.Path, step_fn: TrainStep
    ) -> "Frozen":
        """The arrays for `step_fn.frozen` that the config names, fitted now if necessary.

        Raises:
          SetupError: a file that the config names is missing or doesn't fit, or the run in the
            workdir or the token cache began with another tokenizer.
        """
        arrays, cache, like = {}, dataset.tokens, step_fn.frozen
        if "target" in like:
            tokenizer = open_tokenizer(cfg, dataset, workdir, like["target"]["tokenizer"])
            arrays["target"] = {"tokenizer": tokenizer}
        elif cache and cfg.objective.token_target.path:  # it is named: it must be the cache's
            like_tokenizer = encoder.build_tokenizer(cfg, step_fn.mesh.size, step_fn.mesh).arrays
            tokenizer = open_tokenizer(cfg, dataset, workdir, like_tokenizer)
            cache.check_tokenizer(digest(tokenizer), cfg.objective.token_target.path)
        if "perceptual" in like:
            checkpoint = Checkpoint.open(cfg.objective.frozen_encoder)
            params = checkpoint.restore_params({"encoder": like["perceptual"]})
            arrays["perceptual"] = _host(params["encoder"])
        identity = digest(arrays["target"]["tokenizer"]) if "target" in arrays else ""
        frozen = cls(arrays, cache.tokenizer_digest if cache else identity)
        frozen._check_kept(workdir)
        return frozen

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each part of the arrays."""
        return {name: digest(part) for name, part in self.arrays.items()}

    def save(self, cfg: Config, workdir: epath.Path) -> None:
        """Records in the workdir which tokenizer the run has, and saves a fitted codebook."""
        if "target" in self.arrays:
            save_fitted(cfg, self.arrays["target"]["tokenizer"], workdir)
        if self.identity:
            storage.write_json(workdir / IDENTITY, {"sha256": self.identity})

    def _check_kept(self, workdir: epath.Path) -> None:
        """Raises SetupError if the run in the workdir began with another tokenizer."""
        path = workdir / IDENTITY
        if not self.identity or not path.exists():
            return
        cure = "It names the tokenizer of the run: copy it again, or choose another --workdir."
        values = storage.read_json(path, cure)
        kept = values.get("sha256") if isinstance(values, dict) else None
        if not isinstance(kept, str):
            raise SetupError(f"{path} cannot be read: it has no sha256. {cure}")
        if kept != self.identity:
            raise SetupError(
                f"--workdir {workdir} holds a run with the tokenizer of SHA-256 {kept[:12]}..., "
                f"and config.objective.target or config.tokens.cache now gives "
                f"{self.identity[:12]}... Name the one that it began with, or choose another "
                f"--workdir."
            )


def open_tokenizer(cfg: Config, dataset: Dataset, directory: epath.Path, like: dict) -> dict:
    """The arrays of the target's tokenizer, with the structure of `like`.

    A codebook without a file is fitted on the training split alone, once: it is looked for in the
    token cache and in `directory` first.

    Raises:
      SetupError: the file is missing, is not that of config.objective.target, or did not make the
        token cache.
    """
    target, cache = cfg.objective.token_target, dataset.tokens
    if not kmeans.is_fitted(target):
        return _trained(cfg, like)
    # One process's fit, to the last bit, everywhere.
    codebook = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    if jax.process_index() == 0:
        places = [epath.Path(d) / FILE for d in (cache and cache.directory, directory) if d]
        there = [path for path in places if path.exists()]
        path = epath.Path(target.path) if target.path else next(iter(there), None)
        if path:
            codebook = kmeans.load(path, target, cfg.model.patch, cfg.data.channels)
            if cache:
                cache.check_tokenizer(digest(codebook), str(path))
        else:
            images = dataset.first_images(target.fit_images)
            codebook = kmeans.fit(target, cfg.model.patch, images, cfg.seed)
    return multihost_utils.broadcast_one_to_all(codebook)


def save_fitted(cfg: Config, arrays: dict, directory: epath.Path) -> None:
    """Saves a fitted codebook in `directory`; trained tokenizers stay where they are."""
    if kmeans.is_fitted(cfg.objective.token_target):
        file = io.BytesIO()
        np.savez(file, **arrays)
        storage.write(directory / FILE, file.getvalue())


def _trained(cfg: Config, like: dict) -> dict:
    """A VQGAN's arrays, from MaskGIT's file or from a run of ours."""
    path = cfg.objective.token_target.path
    if not path:
        raise SetupError(
            "config.objective.target.path is empty: give MaskGIT's tokenizer_imagenet256_checkpoint"
            ", or the --workdir of a run of a tokenizer (configs/vqgan_*.py)."
        )
    if not epath.Path(split_step(path)[0]).is_dir():
        return vqgan.load_maskgit(epath.Path(path), cfg.objective.token_target, like)
    checkpoint = Checkpoint.open(path)
    objective = checkpoint.config.objective
    if objective.leaves != "tokenizer":
        raise SetupError(f"{path} is a {objective.name!r} run, and no tokenizer of images.")
    theirs, ours = section(objective.tokenizer), section(cfg.objective.token_target)
    found = differences(theirs, ours, "config.objective.target")
    if changed := [x for x in found if not x.startswith(IN_FILE_ONLY)]:
        raise SetupError(f"{path} is another tokenizer: {'; '.join(changed)} (there; here).")
    return _host(checkpoint.restore_params({"tokenizer": like})["tokenizer"])


def digest(arrays: dict) -> str:
    """SHA-256 of names, shapes and values, the same however the arrays were stored."""
    sha = hashlib.sha256()
    for name, x in sorted(traverse_util.flatten_dict(arrays, sep="/").items()):
        x = np.ascontiguousarray(x, np.float32)
        sha.update(f"{name}{x.shape}".encode() + x.tobytes())
    return sha.hexdigest()


def _host(tree: dict) -> dict:
    return jax.tree.map(np.asarray, tree)
