"""SupMIM on emoji_designs: configs/emoji_supervised.py plus the masked branch.

  python -m supmim_jax.train --config configs/emoji_supmim.py --workdir runs/emoji_supmim

Hardware: 2 CPU cores. All values are our choices. The learning rate is the best of three for this
recipe with codes of luminance (configs/studies/emoji_learning_rate.py). Codes of colour are better
targets than those (docs/study.md), and take no training, as a VQGAN does.
"""

from configs import base, debug, emoji_supervised
from supmim_jax import config as c


def experiment() -> c.Config:
    target = c.PatchCodesConfig(codes=256, fit_images=4216)
    supmim = c.changed(debug.MASKED_BRANCH, target=target)
    run = base.with_masked_branch(emoji_supervised.experiment(), supmim)
    return c.changed(run, optim={"lr": 2e-3})
