"""The .npz files of Google's ViTs: AugReg's (vision_transformer, arXiv 2106.10270), big_vision's.

They have no config: everything follows from names and shapes. Which numbers flax gave to the
modules of a block depends on its version, so that they are found by their kind. Their GELU is
flax's default, the tanh form. They are read only.
"""

import re

import numpy as np

from supmim_jax.config import ViTConfig
from supmim_jax.errors import SetupError
from supmim_jax.formats import files
from supmim_jax.formats.layout import BLOCKS, Foreign, Layout, Row, count, shapes

BLOCK = "Transformer/encoderblock_{}"
STACKED = "Transformer/encoderblock/"  # of big_vision's scan: the layers are the first axis
POSITIONS = ("Transformer/posembed_input/pos_embedding", "pos_embedding")
PATCHES = "embedding/kernel"
QKV = ("query", "key", "value")
TEMPERATURE = 10_000.0


def layout(
    model: ViTConfig,
    channels: int,
    positions: int,
    names: dict[str, str],
    *,
    head: bool,
    prefix: int,
) -> Layout:
    """The rows for a model with this many patch positions; `names` are those of `_modules`."""
    width, heads, patch = model.width, model.heads, model.patch
    per_head = (heads, width // heads)
    attention, mlp = f"{BLOCK}/{names['attention']}", f"{BLOCK}/{names['mlp']}"

    def dense(ours: str, name: str) -> tuple[Row, Row]:
        return Row(f"{ours}/kernel", (f"{name}/kernel",)), Row(f"{ours}/bias", (f"{name}/bias",))

    def norm(ours: str, name: str) -> tuple[Row, Row]:
        return Row(f"{ours}/scale", (f"{name}/scale",)), Row(f"{ours}/bias", (f"{name}/bias",))

    rows = (
        Row("encoder/patches/kernel", (PATCHES,), (patch, patch, channels, width)),
        Row("encoder/patches/bias", ("embedding/bias",)),
        Row("encoder/positions", (names["positions"],), (1, positions, width)),
        *norm(f"{BLOCKS}/norm1", f"{BLOCK}/{names['norm1']}"),
        Row(
            f"{BLOCKS}/qkv/kernel",
            tuple(f"{attention}/{name}/kernel" for name in QKV),
            (width, *per_head),
        ),
        Row(f"{BLOCKS}/qkv/bias", tuple(f"{attention}/{name}/bias" for name in QKV), per_head),
        Row(f"{BLOCKS}/out/kernel", (f"{attention}/out/kernel",), (*per_head, width)),
        Row(f"{BLOCKS}/out/bias", (f"{attention}/out/bias",)),
        *norm(f"{BLOCKS}/norm2", f"{BLOCK}/{names['norm2']}"),
        *dense(f"{BLOCKS}/fc1", f"{mlp}/Dense_0"),
        *dense(f"{BLOCKS}/fc2", f"{mlp}/Dense_1"),
        *norm("encoder/norm", "Transformer/encoder_norm"),
    )
    if head:
        rows += dense("head", "head")
    if model.pooling == "cls":
        rows += (Row("encoder/cls", ("cls",), (1, 1, width)),)
    return Layout(rows, names["positions"] if prefix else "", prefix)


def read(
    arrays: dict[str, np.ndarray], file: str, image_size: int
) -> tuple[Foreign, dict[str, np.ndarray]]:
    """The model that names and shapes describe, and its arrays under AugReg's form of names.

    Args:
      arrays: of the file.
      file: its name, for errors.
      image_size: of a model with fixed positions, which does not tell its own.

    Raises:
      SetupError: an array that decides this is missing or has other dimensions, or belongs to a
        part that this encoder has not.
    """
    arrays = _plain(arrays, file)
    if pooled := next((name for name in arrays if name.startswith("MAPHead")), ""):
        raise SetupError(f"{file} has {pooled}: attention pooling, which this encoder has not.")
    shape = shapes(arrays, file)
    patch, columns, channels, width = shape(PATCHES, 4)
    if patch != columns:
        raise SetupError(f"{file}: {PATCHES} has patches of {patch}x{columns}, not square.")
    cls, names = "cls" in arrays, _modules(arrays, file)
    if not names["positions"]:
        if image_size % patch:
            raise SetupError(
                f"{file} has no positions, as big_vision's sincos2d: they depend on the size of "
                f"its images, and {image_size} is no multiple of its patches of {patch}. Give "
                f"--config and --config.data.image_size=<the size that it was trained at>."
            )
        names["positions"] = POSITIONS[0]
        arrays = arrays | {POSITIONS[0]: sincos2d(image_size // patch, width)[None]}
    rows = shapes(arrays, file)(names["positions"], 3)[1]
    # AugReg's CLS token has a position, big_vision's has none.
    prefix = int(cls) if round((rows - cls) ** 0.5) ** 2 == rows - cls else 0
    # A layer with tanh between pooling and head: without both, it is an encoder by itself.
    without = ("pre_logits/", "head/") if "pre_logits/kernel" in arrays else ()
    head = "head/kernel" in arrays and not without
    image_size = files.root(rows - prefix, file, names["positions"]) * patch
    model = ViTConfig(
        patch=patch,
        width=width,
        depth=count(arrays, BLOCK.format(r"(\d+)") + "/.*"),
        mlp_dim=shape(f"{BLOCK.format(0)}/{names['mlp']}/Dense_0/kernel", 2)[1],
        heads=shape(f"{BLOCK.format(0)}/{names['attention']}/query/kernel", 3)[1],
        pooling="cls" if cls else "gap",
        gelu="tanh",
    )
    found = Foreign(
        model=model,
        num_classes=shape("head/kernel", 2)[1] if head else 0,
        image_size=image_size,
        channels=channels,
        eval_resize=image_size * 8 // 7,  # 256 for 224, as their evaluation
        layout=layout(model, channels, rows - prefix, names, head=head, prefix=prefix),
        leaves_out=without,
    )
    return found, arrays


def sincos2d(side: int, width: int) -> np.ndarray:
    """big_vision's fixed positions, float32 (side * side) x width.

    Other than MAE's: columns come first, and frequencies go down to 1 / TEMPERATURE itself.
    """
    frequencies = TEMPERATURE ** -np.linspace(0.0, 1.0, width // 4)
    row, column = np.divmod(np.arange(side * side), side)
    angles = [place[:, None] * frequencies for place in (column, row)]
    parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _plain(arrays: dict[str, np.ndarray], file: str) -> dict[str, np.ndarray]:
    """Without what is before all names (params/, params/img/), and with an array for each layer."""
    roots = [x.removesuffix(PATCHES) for x in arrays if f"/{x}".endswith(f"/{PATCHES}")]
    roots = [root for root in roots if arrays[f"{root}{PATCHES}"].ndim == 4]
    if len(roots) != 1:
        raise SetupError(
            f"{file}: {PATCHES} is there {len(roots)} times, expected once, with 4 dimensions."
        )
    found = {k.removeprefix(roots[0]): x for k, x in arrays.items() if k.startswith(roots[0])}
    for name in [x for x in found if x.startswith(STACKED)]:
        for i, layer in enumerate(found.pop(name)):
            found[f"{BLOCK.format(i)}/{name.removeprefix(STACKED)}"] = layer
    return found


def _modules(arrays: dict[str, np.ndarray], file: str) -> dict[str, str]:
    """The names of the modules of a block, and that of the positions; "" where there are none."""
    block = {name.split("/")[2] for name in arrays if name.startswith(BLOCK.format(0) + "/")}
    names = {"positions": next((x for x in POSITIONS if x in arrays), "")}
    kinds = (
        ("LayerNorm", ("norm1", "norm2")),
        ("MultiHeadDotProductAttention", ("attention",)),
        ("MlpBlock", ("mlp",)),
    )
    for kind, ours in kinds:
        found = sorted(x for x in block if re.fullmatch(rf"{kind}_\d+", x))
        if len(found) != len(ours):
            raise SetupError(
                f"{file}: {BLOCK.format(0)} has {', '.join(found) or 'nothing'} as {kind}, "
                f"expected {len(ours)}; it has {', '.join(sorted(block)) or 'nothing'}."
            )
        names |= dict(zip(ours, found))
    return names
