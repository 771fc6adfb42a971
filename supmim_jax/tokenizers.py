"""Where the frozen tokenizer's arrays come from: a file, or a fit on the training split."""

import jax
from etils import epath
from jax.experimental import multihost_utils

from supmim_jax.config import Config
from supmim_jax.data import pipeline
from supmim_jax.models import patch_codes

FILE = "tokenizer.npz"


def arrays(cfg: Config, workdir: epath.Path) -> dict:
    """The `frozen` argument of the train step as host arrays; {} where nothing is frozen.

    A codebook is fitted once per run, on the training split alone; `save` keeps it in
    workdir/tokenizer.npz, where a resumed run and `picture` find it.

    Raises:
      SetupError: the file named in config.objective.tokenizer.path is missing or doesn't fit.
    """
    if cfg.objective.name != "supmim":
        return {}
    tokenizer, patch = cfg.objective.tokenizer, cfg.model.patch
    path = epath.Path(tokenizer.path or workdir / FILE)
    if tokenizer.path or path.exists():
        return {"tokenizer": patch_codes.load(path, tokenizer, patch, cfg.data.channels)}
    images = pipeline.first_images(cfg, tokenizer.fit_images)
    codes = patch_codes.fit(tokenizer, patch, images, cfg.seed)
    if jax.process_count() > 1:  # one process's fit, to the last bit, everywhere
        codes = multihost_utils.broadcast_one_to_all(codes)
    return {"tokenizer": codes}


def save(arrays: dict, workdir: epath.Path) -> None:
    """Keeps the tokenizer with the run."""
    if arrays:
        patch_codes.save(workdir / FILE, arrays["tokenizer"])
