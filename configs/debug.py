"""SupMIM on the built-in data: the main job of README's first command.

  python -m supmim_jax.train --config configs/debug.py --workdir runs/supmim

Hardware: 2 CPU cores.
"""

from configs import base, debug_supervised
from supmim_jax.config import Config, DecoderConfig, PatchCodesConfig, SupMIMConfig

# All of these are our choices, made on the validation split of fractals/tiny (docs/results.md).
MASKED_BRANCH = SupMIMConfig(
    mask_ratio=0.5,
    encoder_input="masked",
    mim_weight=1.0,
    decoder=DecoderConfig(depth=1, width=64, mlp_dim=256, heads=2),
    target=PatchCodesConfig(codes=64, normalize="raw", fit_images=240),
)


def experiment() -> Config:
    return base.with_masked_branch(debug_supervised.experiment(), MASKED_BRANCH)
