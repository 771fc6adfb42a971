"""Fine-tunes the encoder of configs/debug.py on the same data, on whole images of 24 px.

  python -m supmim_jax.train --config configs/debug.py --workdir runs/supmim
  python -m supmim_jax.train --config configs/finetune_debug.py --workdir runs/finetuned

Hardware: 2 CPU cores. Another checkpoint: --config.init.checkpoint=<its --workdir>[@step]. All
values are our choices, made without a search.
"""

from configs import debug_supervised
from supmim_jax.config import Config, InitConfig, OptimConfig, changed


def experiment() -> Config:
    return changed(
        debug_supervised.experiment(),
        epochs=64,  # 240 steps
        data={"image_size": 24},
        model={"position_grid": 5},  # of 20 px in patches of 4
        init=InitConfig(checkpoint="runs/supmim", head="keep"),
        optim=OptimConfig(lr=2e-4, weight_decay=0.05, warmup_epochs=5, layer_decay=0.75),
    )
