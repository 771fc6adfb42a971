"""The .npz files of Google's vision_transformer repository: ViT and AugReg (arXiv 2106.10270).

They have no config: everything follows from names and shapes. Their GELU is flax's default, the
tanh form. They are read only.
"""

from collections.abc import Callable
from typing import Any

from supmim_jax.config import ViTConfig
from supmim_jax.errors import SetupError
from supmim_jax.formats import files
from supmim_jax.formats.layout import BLOCKS, Foreign, Layout, Row, count

BLOCK = "Transformer/encoderblock_{}"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_1"
POSITIONS = "Transformer/posembed_input/pos_embedding"
QKV = ("query", "key", "value")


def layout(model: ViTConfig, channels: int, positions: int) -> Layout:
    """The rows for a model with this many patch positions."""
    width, heads, patch = model.width, model.heads, model.patch
    per_head = (heads, width // heads)

    def dense(ours: str, name: str) -> tuple[Row, Row]:
        return Row(f"{ours}/kernel", (f"{name}/kernel",)), Row(f"{ours}/bias", (f"{name}/bias",))

    def norm(ours: str, name: str) -> tuple[Row, Row]:
        return Row(f"{ours}/scale", (f"{name}/scale",)), Row(f"{ours}/bias", (f"{name}/bias",))

    rows = (
        Row("encoder/patches/kernel", ("embedding/kernel",), (patch, patch, channels, width)),
        Row("encoder/patches/bias", ("embedding/bias",)),
        Row("encoder/positions", (POSITIONS,), (1, positions, width)),
        *norm(f"{BLOCKS}/norm1", f"{BLOCK}/LayerNorm_0"),
        Row(
            f"{BLOCKS}/qkv/kernel",
            tuple(f"{ATTENTION}/{name}/kernel" for name in QKV),
            (width, *per_head),
        ),
        Row(f"{BLOCKS}/qkv/bias", tuple(f"{ATTENTION}/{name}/bias" for name in QKV), per_head),
        Row(f"{BLOCKS}/out/kernel", (f"{ATTENTION}/out/kernel",), (*per_head, width)),
        Row(f"{BLOCKS}/out/bias", (f"{ATTENTION}/out/bias",)),
        *norm(f"{BLOCKS}/norm2", f"{BLOCK}/LayerNorm_2"),
        *dense(f"{BLOCKS}/fc1", f"{BLOCK}/MlpBlock_3/Dense_0"),
        *dense(f"{BLOCKS}/fc2", f"{BLOCK}/MlpBlock_3/Dense_1"),
        *norm("encoder/norm", "Transformer/encoder_norm"),
        *dense("head", "head"),
    )
    if model.pooling == "gap":
        return Layout(rows)
    return Layout((*rows, Row("encoder/cls", ("cls",), (1, 1, width))), POSITIONS)


def read(arrays: dict[str, Any], file: str) -> Foreign:
    """The model that the names and shapes describe.

    Raises:
      SetupError: an array that decides this is missing or has other dimensions.
    """
    shape = _shapes(arrays, file)
    patch, columns, channels, width = shape("embedding/kernel", 4)
    if patch != columns:
        raise SetupError(f"{file}: embedding/kernel has patches of {patch}x{columns}, not square.")
    pooling = "cls" if "cls" in arrays else "gap"
    rows = shape(POSITIONS, 3)[1] - (pooling == "cls")
    image_size = files.root(rows, file, POSITIONS) * patch
    model = ViTConfig(
        patch=patch,
        width=width,
        depth=count(arrays, BLOCK.format(r"(\d+)") + "/.*"),
        mlp_dim=shape(f"{BLOCK.format(0)}/MlpBlock_3/Dense_0/kernel", 2)[1],
        heads=shape(f"{ATTENTION.format(0)}/query/kernel", 3)[1],
        pooling=pooling,
        gelu="tanh",
    )
    return Foreign(
        model=model,
        num_classes=shape("head/kernel", 2)[1],
        image_size=image_size,
        channels=channels,
        eval_resize=image_size * 8 // 7,  # 256 for 224, as their evaluation
        layout=layout(model, channels, rows),
    )


def _shapes(arrays: dict[str, Any], file: str) -> Callable[[str, int], tuple[int, ...]]:
    """Looks up the shape of an array that must be there with so many dimensions."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = list(arrays[name].shape) if name in arrays else "missing"
        if name not in arrays or len(found) != dimensions:
            raise SetupError(f"{file}: {name} is {found}, expected {dimensions} dimensions.")
        return tuple(found)

    return shape
