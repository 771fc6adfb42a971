"""The networks: encoder, decoder and tokenizers."""

from dataclasses import dataclass
from typing import Literal

from supmim_jax.config.fields import INF, path_field, within
from supmim_jax.errors import ConfigError

VARIANTS = {  # width, depth, mlp_dim, heads: ViT (2010.11929) and Scaling ViTs (2106.04560)
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
}


@dataclass(frozen=True)
class ViTConfig:
    patch: int = within(4, 1, 2**14)  # pixels
    width: int = within(64, 1, 2**16)
    depth: int = within(4, 1, 2**10)
    mlp_dim: int = within(256, 1, 2**18)
    heads: int = within(2, 1, 2**16)
    pooling: Literal["gap", "cls"] = "gap"
    # Learned tokens beside the patches that nothing is read from (arXiv 2309.16588).
    registers: int = within(0, 0, 2**10)
    positions: Literal["learned", "sincos2d"] = "learned"
    # sincos2d: patches per side of the grid that the coordinates are of, for an encoder that was
    # trained at another image size; 0: the image's own.
    position_grid: int = within(0, 0, 2**14)
    layer_scale: float = within(0.0, 0.0, 1.0)  # initial value; 0 leaves LayerScale out
    drop_path: float = within(0.0, 0.0, 0.99)  # of the last block
    drop_path_form: Literal["linear", "constant"] = "linear"  # from 0; or of all blocks (DeiT-III)
    # Of the embedded patches and, in each block, of what attention gives, of the MLP's hidden
    # values and of what it gives: where ViT's code has dropout. Attention's weights keep all.
    dropout: float = within(0.0, 0.0, 0.99)
    gelu: Literal["exact", "tanh"] = "exact"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters are float32
    remat: Literal["none", "names", "full"] = "none"

    def __post_init__(self):
        if self.width % self.heads:
            raise ConfigError(f"width is {self.width}, not a multiple of heads = {self.heads}.")
        if self.positions == "sincos2d" and self.width % 4:
            raise ConfigError(f"width is {self.width}; sincos2d positions need a multiple of 4.")
        if self.positions == "learned" and self.position_grid:
            raise ConfigError(
                f"position_grid is {self.position_grid}; it must be 0 with learned positions, "
                f"which are resized when a run starts from another's."
            )

    @property
    def prefix(self) -> int:
        """Tokens beside the patches."""
        return int(self.pooling == "cls") + self.registers

    @classmethod
    def variant(cls, name: str, **fields) -> "ViTConfig":
        """ViTConfig of a published size (a key of VARIANTS); `fields` sets the rest."""
        width, depth, mlp_dim, heads = VARIANTS[name]
        return cls(width=width, depth=depth, mlp_dim=mlp_dim, heads=heads, **fields)


@dataclass(frozen=True)
class DecoderConfig:
    depth: int = within(1, 1, 2**10)
    width: int = within(64, 1, 2**16)
    mlp_dim: int = within(256, 1, 2**18)
    heads: int = within(2, 1, 2**16)

    def __post_init__(self):
        if self.width % self.heads or self.width % 4:
            raise ConfigError(
                f"width is {self.width}; it must be a multiple of heads = {self.heads} and of 4."
            )


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
    cache: str = path_field()  # directory that cache_tokens has written; "" tokenises in the step
    views: int = within(0, 0, INF)  # crops per image, cycled; 0: a new one every epoch
