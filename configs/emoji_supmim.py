"""SupMIM on emoji_designs: configs/emoji_supervised.py plus the masked branch.

  python -m supmim_jax.train --config configs/emoji_supmim.py --workdir runs/emoji_supmim

Hardware: 2 CPU cores. All values are our choices. The learning rate is the best of three for this
recipe (configs/studies/emoji_learning_rate.py). Luminance codes, as a designer's colours say little
of the emoji.
"""

from configs import base, debug, emoji_supervised
from supmim_jax import config as c


def experiment() -> c.Config:
    target = c.PatchCodesConfig(codes=256, normalize="luminance", fit_images=4216)
    supmim = c.changed(debug.MASKED_BRANCH, target=target)
    run = base.with_masked_branch(emoji_supervised.experiment(), supmim)
    return c.changed(run, optim={"lr": 2e-3})
