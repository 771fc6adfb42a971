"""The same job in small: what `:debug` behind the name of a config file makes of an experiment."""

from supmim_jax.config.data import MasksConfig
from supmim_jax.config.experiment import Config, changed
from supmim_jax.config.model import DecoderConfig, PatchCodesConfig
from supmim_jax.config.objective import PerceptualConfig
from supmim_jax.config.training import InitConfig


def debug(config: Config) -> Config:
    """The job on built-in images: for one GPU, or minutes on a CPU.

    Keeps the recipe (objective, mask, losses, augmentation, optimizer, dtype); shrinks the model
    to two layers of width 192 and the schedule to 20 steps of 32 images. What needs a file is left
    out: a VQGAN target becomes patch codes, a perceptual term is dropped, and what would start from
    a checkpoint starts anew.
    """
    data = {
        "name": "fractals/small",
        "train_split": "train[:640]",
        "eval_split": "validation[:100]",
        "train_examples": 640,
        "num_classes": 50,
        "label_field": "label",
        "masks": MasksConfig(field="segmentation", num_classes=51),
        "workers": 0,
        "threads": 2,
    }
    objective = {}
    if config.objective.masks_patches:
        objective["decoder"] = DecoderConfig(depth=1, width=96, mlp_dim=384, heads=3)
    if config.objective.plain_target:
        objective["target"] = PatchCodesConfig(codes=64, normalize="luminance", fit_images=64)
    if config.objective.leaves == "tokenizer":
        size = min(config.data.image_size, 4 * config.objective.tokenizer.downsampling)
        data |= {"image_size": size, "eval_resize": size}
        objective |= {"tokenizer": {"filters": 32}, "perceptual": PerceptualConfig()}
    return changed(
        config,
        model={"width": 192, "depth": 2, "mlp_dim": 768, "heads": 3},
        data=data,
        objective=objective,
        init=InitConfig(),
        optim={"warmup_epochs": 0.25},
        batch_size=32,
        epochs=1,
        eval={"batch_size": 32, "every": 0},
        log={"every": 5},
    )
