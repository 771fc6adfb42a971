"""An image tokenizer for the built-in data: 64 codes, a token for each 4x4 patch.

  python -m supmim_jax.train --config configs/vqgan_debug.py --workdir runs/vqgan

Hardware: 2 CPU cores. configs/debug_vqgan.py trains SupMIM with its tokens.
"""

from configs import debug_supervised
from supmim_jax import config as c

# Our choices, for 20-pixel images of one channel. The entropy weight is a tenth of MaskGIT's: at
# 0.1 all codes are used more evenly and images come back worse (docs/tokens.md).
TOKENIZER = c.VQGANConfig(
    filters=32, multipliers=(1, 1, 2), res_blocks=1, groups=4, codes=64, code_dim=16
)


def experiment() -> c.Config:
    return c.changed(
        debug_supervised.experiment(),
        epochs=400,
        objective=c.VQGANObjectiveConfig(tokenizer=TOKENIZER, entropy_weight=0.01),
        optim=c.OptimConfig(lr=3e-3, weight_decay=0.0, b2=0.99, warmup_epochs=10),
        eval=c.EvalConfig(batch_size=240),
    )
