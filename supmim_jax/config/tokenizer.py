"""What masked patches are predicted as, and where tokens come from."""

from dataclasses import dataclass
from typing import Literal

from supmim_jax.config.fields import INF, ConfigError, path_field, within

MOST_LEVELS = 10  # resolutions of a VQGAN: tokens of up to 512 pixels


@dataclass(frozen=True)
class PatchCodesConfig:
    name: Literal["patch_codes"] = "patch_codes"
    codes: int = within(64, 2, 65535)  # k of k-means; ids fit uint16
    normalize: Literal["raw", "luminance"] = "raw"
    fit_images: int = within(240, 1, INF)  # first images of the training split
    path: str = path_field()  # a saved codebook (.npz); "" fits one on the training split


@dataclass(frozen=True)
class VQGANConfig:
    """The defaults are MaskGIT's ImageNet tokenizer: 256 px to 16 x 16 codes."""

    name: Literal["vqgan"] = "vqgan"
    path: str = path_field()  # MaskGIT's msgpack file, or workdir[@step] of a run of vqgan
    filters: int = within(128, 1, 2**14)  # channels at full resolution
    multipliers: tuple[int, ...] = within((1, 1, 2, 2, 4), 1, 2**10)  # of them; halves between
    res_blocks: int = within(2, 1, 64)  # per resolution
    groups: int = within(32, 1, 2**14)  # of GroupNorm
    codes: int = within(1024, 2, 65535)
    code_dim: int = within(256, 1, 2**14)
    # "highest" gives the ids of float32 on any hardware; "default" is faster on TPUs and GPUs.
    precision: Literal["highest", "default"] = "highest"

    def __post_init__(self):
        if len(self.multipliers) > MOST_LEVELS:
            raise ConfigError(
                f"multipliers has {len(self.multipliers)} entries, each but one a halving of the "
                f"resolution; give at most {MOST_LEVELS}."
            )
        for multiplier in self.multipliers:
            if self.filters * multiplier % self.groups:
                raise ConfigError(
                    f"filters x multiplier is {self.filters * multiplier}, not a multiple of "
                    f"groups = {self.groups}."
                )

    @property
    def downsampling(self) -> int:
        """Pixels of a token's side."""
        return 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class PixelsConfig:
    """No tokens: the pixels of each patch, less its mean, by its standard deviation (MAE's)."""

    name: Literal["pixels"] = "pixels"


@dataclass(frozen=True)
class TokensConfig:
    cache: str = path_field()  # directory written by supmim_jax.tokenize; "" tokenises in the step
    views: int = within(0, 0, INF)  # crops per image, cycled; 0: a new one every epoch
