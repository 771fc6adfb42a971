"""The .npz files of Google's ViTs: AugReg's (vision_transformer, arXiv 2106.10270), big_vision's.

They carry no config: everything follows from names and shapes, and big_vision's names are converted
to AugReg's first. Their GELU is flax's default, the tanh form. We only read them.
"""

import re

import numpy as np

from supmim_jax.config import ViTConfig
from supmim_jax.errors import SetupError
from supmim_jax.formats import layout
from supmim_jax.formats.layout import BLOCKS, Foreign, Row
from supmim_jax.models.transformer import sincos2d

BLOCK = "Transformer/encoderblock_{}"
STACKED = "Transformer/encoderblock/"  # of big_vision's scan: the layers are the first axis
POSITIONS = "Transformer/posembed_input/pos_embedding"
PATCHES = "embedding/kernel"
# The modules of a block by kind, as AugReg has them. Which numbers flax gives to them depends on
# its version.
NORMS = ("LayerNorm_0", "LayerNorm_2")
ATTENTION, MLP = "MultiHeadDotProductAttention_1", "MlpBlock_3"
MODULES = {"LayerNorm": NORMS, "MultiHeadDotProductAttention": (ATTENTION,), "MlpBlock": (MLP,)}


def rows(model: ViTConfig, channels: int, head: bool) -> tuple[Row, ...]:
    """The table of a model."""
    width, patch, attention = model.width, model.patch, f"{BLOCK}/{ATTENTION}"
    per_head = (model.heads, width // model.heads)
    qkv = [f"{attention}/{name}" for name in ("query", "key", "value")]
    found = [
        Row("encoder/patches/kernel", (PATCHES,), (patch, patch, channels, width)),
        Row("encoder/patches/bias", ("embedding/bias",)),
        Row(layout.POSITIONS, (POSITIONS,), (1, -1, width)),
        Row(f"{BLOCKS}/qkv/kernel", tuple(f"{x}/kernel" for x in qkv), (width, *per_head)),
        Row(f"{BLOCKS}/qkv/bias", tuple(f"{x}/bias" for x in qkv), per_head),
        Row(f"{BLOCKS}/out/kernel", (f"{attention}/out/kernel",), (*per_head, width)),
        Row(f"{BLOCKS}/out/bias", (f"{attention}/out/bias",)),
    ]
    modules = {  # whose arrays are as ours
        f"{BLOCKS}/norm1": f"{BLOCK}/{NORMS[0]}",
        f"{BLOCKS}/norm2": f"{BLOCK}/{NORMS[1]}",
        f"{BLOCKS}/fc1": f"{BLOCK}/{MLP}/Dense_0",
        f"{BLOCKS}/fc2": f"{BLOCK}/{MLP}/Dense_1",
        "encoder/norm": "Transformer/encoder_norm",
    }
    for ours, theirs in (modules | ({"head": "head"} if head else {})).items():
        for name in ("scale" if "norm" in ours else "kernel", "bias"):
            found.append(Row(f"{ours}/{name}", (f"{theirs}/{name}",)))
    if model.pooling == "cls":
        found.append(Row(layout.CLS, ("cls",), (1, 1, width)))
    return tuple(found)


def read(
    arrays: dict[str, np.ndarray], file: str, image_size: int
) -> tuple[Foreign, dict[str, np.ndarray]]:
    """The model that names and shapes describe, and its arrays under AugReg's names.

    Args:
      arrays: of the file.
      file: its name, for errors.
      image_size: of a model with fixed positions, which does not tell its own.

    Raises:
      SetupError: an array that decides this is missing or has other dimensions, or belongs to a
        part that this encoder has not.
    """
    arrays = _under_augregs_names(arrays, file)
    if pooled := next((name for name in arrays if name.startswith("MAPHead")), ""):
        raise SetupError(f"{file} has {pooled}: attention pooling, which this encoder has not.")
    shape = layout.shapes(arrays, file)
    patch, columns, channels, width = shape(PATCHES, 4)
    if patch != columns:
        raise SetupError(f"{file}: {PATCHES} has patches of {patch}x{columns}, not square.")
    if POSITIONS not in arrays:
        if image_size % patch:
            raise SetupError(
                f"{file} has no positions, as big_vision's sincos2d: they depend on the size of "
                f"its images, and {image_size} is no multiple of its patches of {patch}. Give "
                f"--config and --config.data.image_size=<the size that it was trained at>."
            )
        # Other than MAE's, these frequencies go down to 1 / 10,000 itself (arXiv 2205.01580).
        side, frequencies = image_size // patch, 10_000.0 ** -np.linspace(0.0, 1.0, width // 4)
        arrays[POSITIONS] = sincos2d(side, side, width, frequencies=frequencies)[None]
    # AugReg's CLS token has a position, big_vision's has none.
    cls = "cls" in arrays
    side, prefix = layout.grid(shape(POSITIONS, 3)[1], int(cls), file, POSITIONS)
    # A layer with tanh between pooling and head: without both, it is an encoder by itself.
    without = ("pre_logits/", "head/") if "pre_logits/kernel" in arrays else ()
    head = "head/kernel" in arrays and not without
    first = BLOCK.format(0)
    model = ViTConfig(
        patch=patch,
        width=width,
        depth=layout.count(arrays, BLOCK.format(r"(\d+)") + "/.*"),
        mlp_dim=shape(f"{first}/{MLP}/Dense_0/kernel", 2)[1],
        heads=shape(f"{first}/{ATTENTION}/query/kernel", 3)[1],
        pooling="cls" if cls else "gap",
        gelu="tanh",
    )
    found = Foreign(
        model=model,
        num_classes=shape("head/kernel", 2)[1] if head else 0,
        image_size=side * patch,
        channels=channels,
        eval_resize=side * patch * 8 // 7,  # 256 for 224, as their evaluation
        rows=rows(model, channels, head),
        prefix=prefix,
        leaves_out=without,
    )
    return found, arrays


def _under_augregs_names(arrays: dict[str, np.ndarray], file: str) -> dict[str, np.ndarray]:
    """Without what is before all names (params/, params/img/), and with an array for each layer."""
    roots = [x.removesuffix(PATCHES) for x in arrays if f"/{x}".endswith(f"/{PATCHES}")]
    roots = [root for root in roots if arrays[f"{root}{PATCHES}"].ndim == 4]
    if len(roots) != 1:
        raise SetupError(
            f"{file}: {PATCHES} is there {len(roots)} times, expected once, with 4 dimensions."
        )
    found = {k.removeprefix(roots[0]): x for k, x in arrays.items() if k.startswith(roots[0])}
    if "pos_embedding" in found:
        found.setdefault(POSITIONS, found.pop("pos_embedding"))
    for name in [x for x in found if x.startswith(STACKED)]:
        for i, layer in enumerate(found.pop(name)):
            found[f"{BLOCK.format(i)}/{name.removeprefix(STACKED)}"] = layer
    first = BLOCK.format(0)
    block = {name.split("/")[2] for name in found if name.startswith(f"{first}/")}
    augregs = {}
    for kind, names in MODULES.items():
        numbered = sorted(x for x in block if re.fullmatch(rf"{kind}_\d+", x))
        if len(numbered) != len(names):
            raise SetupError(
                f"{file}: {first} has {', '.join(numbered) or 'nothing'} as {kind}, expected "
                f"{len(names)}; it has {', '.join(sorted(block)) or 'nothing'}."
            )
        augregs |= dict(zip(numbered, names))
    return {"/".join(augregs.get(x, x) for x in k.split("/")): x for k, x in found.items()}
