"""MAE ViT-B/16 on ImageNet-1k (arXiv 2111.06377).

  python -m supmim_jax.train --config configs/mae_b16_imagenet1k.py --workdir gs://...

Hardware: a TPU slice or several GPUs; with `:debug` after the file name, any machine.
Fine-tuned top-1 with ViT-B after 1600 epochs: 83.6 % (paper); not measured here. Recipe: the
paper's appendix A.1, for 800 epochs, the default of its ablations.
"""

from configs import base
from supmim_jax.config import Config, MAEConfig, ViTConfig


def experiment() -> Config:
    return Config(
        batch_size=4096,
        epochs=800,
        data=base.IMAGENET_1K_CROPS,
        model=ViTConfig.variant("B", patch=16, pooling="cls", **base.AT_SCALE),
        objective=MAEConfig(decoder=base.MAE_DECODER),
        optim=base.MAE_OPTIM,
        eval=base.EVAL_WITHOUT_LABELS,
    )
