"""CMAE (arXiv 2205.10546) on built-in images, without their labels.

  python -m supmim_jax.train --config configs/cmae_fractals.py --workdir runs/cmae

Hardware: 2 CPU cores. As configs/mae_fractals.py, which is the first row of the paper's ablation;
the other rows are this config less what comes later:

  + smaller decoder:  --config.objective.contrastive.weight=0 \
                      --config.objective.position.weight=0 --config.data.crop=inception
  + contrastive:      --config.objective.position.weight=0 --config.data.crop=inception
  + position:         --config.data.crop=inception
  + ContrastiveCrop:  nothing

What objectives/cmae.py does not name as the authors' is our choice: the leak of the position task
and the threshold of the boxes by the validation split (docs/mae.md), the rest without a search.
"""

from configs import mae_fractals
from supmim_jax import config as c


def experiment() -> c.Config:
    # New boxes after each fifth of the run.
    boxes = c.ContrastiveCropConfig(alpha=0.6, threshold=0.5, every_epochs=12.8)
    return c.changed(
        mae_fractals.experiment(),
        data={"crop": "contrastive", "contrastive_crop": boxes},
        objective=c.CMAEConfig(
            decoder=c.DecoderConfig(depth=1, width=16, mlp_dim=64, heads=2),
            position=c.PositionConfig(leak_free=False),
        ),
    )
