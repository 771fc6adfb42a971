"""Makes the image tokenizer that a config names; each has `encode`, `decode` and `num_codes`."""

from flax import nnx

from supmim_jax.config import DataConfig, PatchCodesConfig, VQGANConfig
from supmim_jax.models.patch_codes import PatchCodes
from supmim_jax.models.vqgan import VQGAN


def make(
    cfg: PatchCodesConfig | VQGANConfig, patch: int, data: DataConfig, rngs: nnx.Rngs
) -> PatchCodes | VQGAN:
    """A tokenizer that gives one token for each patch of `patch` pixels of the data's images."""
    if cfg.name == "patch_codes":
        return PatchCodes(cfg, patch, data)
    side = data.image_size // patch
    return VQGAN(cfg, channels=data.channels, side=side, size=data.image_size, rngs=rngs)
