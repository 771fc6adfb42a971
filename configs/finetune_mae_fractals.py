"""Fine-tunes an encoder of configs/mae_fractals.py on the few labelled images of fractals/tiny.

  python -m supmim_jax.train --config configs/mae_fractals.py --workdir runs/mae
  python -m supmim_jax.train --config configs/finetune_mae_fractals.py --workdir runs/finetuned

Hardware: 2 CPU cores. Another checkpoint: --config.init.checkpoint=<its --workdir>[@step]. Without
one, as a baseline: --config.init.checkpoint= --config.optim.layer_decay=1. All values are our
choices, made without a search.
"""

from configs import debug_supervised, mae_fractals
from supmim_jax import config as c


def experiment() -> c.Config:
    return c.changed(
        mae_fractals.experiment(),
        epochs=160,  # 600 steps
        data={"train_split": "train", "train_examples": 240, "eval_split": "validation"},
        model={"drop_path": 0.1},
        objective=debug_supervised.OBJECTIVE,
        init=c.InitConfig(checkpoint="runs/mae"),
        optim=c.OptimConfig(
            lr=2e-3, weight_decay=0.05, b2=0.98, warmup_epochs=25, layer_decay=0.75
        ),
        eval=c.EvalConfig(),
    )
