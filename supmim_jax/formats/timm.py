"""timm's VisionTransformer, in the form of its hub: config.json and model.safetensors.

It expresses every model of ours: without a CLS token, with the last norm before the pooling
(fc_norm=False), a CLS token without a position (no_embed_class), LayerScale, either GELU.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from supmim_jax.config import Config, ViTConfig
from supmim_jax.errors import SetupError
from supmim_jax.formats.files import Section, root, strings
from supmim_jax.formats.layout import (
    BLOCKS,
    Foreign,
    Layout,
    Row,
    convolution,
    count,
    linear,
    norm,
    shapes,
    to_foreign,
    with_positions,
)

# Pillow's filters nearest to crops.resize; its bilinear one smooths as it shrinks, ours does not.
INTERPOLATION = {"area": "box", "linear": "bilinear"}
GELU = {"exact": "gelu", "tanh": "gelu_tanh"}
# No array shows how many heads there are, nor which GELU. Where model_args do not say either, it is
# what timm's function of the architecture passes, by its name; 0: heads of 64 channels.
ARCHITECTURES = {
    r"(vit|deit3)_huge_patch1[46](_gap)?_\d+|vit_giant_patch1[46](_gap)?_\d+": (16, "exact"),
    r"vit_gigantic_patch14_224|vit_base_patch16_gap_224": (16, "exact"),
    r"vit_so400m_patch14_siglip_gap_\d+": (16, "exact"),
    r"vit_(so400m|giantopt)_patch16_siglip_gap_\d+": (16, "tanh"),
    r"vit_base_patch32_siglip_gap_256|vit_large_patch16_siglip_gap_512": (0, "tanh"),
    r"vit_(base|large)_patch16_siglip_gap_\d+|flexivit_(small|base|large)": (0, "exact"),
    r"(vit|deit3?)_(tiny|small|medium|base|large)_patch\d+(_plus|_36x1)?_\d+": (0, "exact"),
    r"vit_(small|base|large)_patch14(_reg4)?_dinov2": (0, "exact"),
    r"vit_so150m_patch16_reg4_gap_\d+": (0, "exact"),
}
# Arrays of parts that this encoder has not, and what these are.
FOREIGN_PARTS = {
    "dist_token": "a distillation token",
    "norm_pre.": "a norm before the blocks",
    "patch_embed.backbone.": "convolutions before the patches",
    "attn_pool.": "attention pooling",
    "blocks.0.attn.q_norm.": "norms of queries and keys",
    "blocks.0.attn.norm.": "a norm inside attention",
    "blocks.0.mlp.norm.": "a norm inside the MLP",
    "blocks.0.mlp.fc1_g.": "a gated MLP",
    "blocks.0.mlp.w12.": "a gated MLP",
    "blocks.0.attn.rel_pos": "relative positions",
    "rel_pos_bias": "relative positions",
}
# Arguments of VisionTransformer that are understood, and those that say nothing about inference.
UNDERSTOOD = (
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth"),
    *("num_heads", "mlp_ratio", "init_values", "class_token", "no_embed_class", "fc_norm"),
    *("act_layer", "reg_tokens", "qkv_bias", "dynamic_img_size"),
)
TRAINING = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")

ROWS = (
    *norm(f"{BLOCKS}/norm1", "blocks.{}.norm1"),
    *linear(f"{BLOCKS}/qkv", "blocks.{}.attn.qkv"),
    *linear(f"{BLOCKS}/out", "blocks.{}.attn.proj"),
    *norm(f"{BLOCKS}/norm2", "blocks.{}.norm2"),
    *linear(f"{BLOCKS}/fc1", "blocks.{}.mlp.fc1"),
    *linear(f"{BLOCKS}/fc2", "blocks.{}.mlp.fc2"),
    *norm("encoder/norm", "norm"),
)
HEAD = linear("head", "head")
LAYER_SCALE = (
    Row(f"{BLOCKS}/scale1", ("blocks.{}.ls1.gamma",)),
    Row(f"{BLOCKS}/scale2", ("blocks.{}.ls2.gamma",)),
)


def layout(
    model: ViTConfig, channels: int, positions: int, *, head: bool, prefix: int = 0
) -> Layout:
    """The rows for a model with this many patch positions, and `prefix` before them."""
    rows = (
        *convolution("patch_embed.proj", model.patch, channels, model.width),
        Row("encoder/positions", ("pos_embed",), shape=(1, positions, model.width)),
        *ROWS,
    )
    if head:
        rows += HEAD
    if model.layer_scale:
        rows += LAYER_SCALE
    if model.pooling == "cls":
        rows += (Row("encoder/cls", ("cls_token",), shape=(1, 1, model.width)),)
    if model.registers:
        rows += (Row("encoder/registers", ("reg_token",), (1, model.registers, model.width)),)
    return Layout(rows, "pos_embed" if prefix else "", prefix)


def write(
    params: Any, cfg: Config, class_names: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, dict]]:
    """The arrays of model.safetensors, and the JSON documents beside it by name."""
    model, data = cfg.model, cfg.data
    side, head = data.image_size // model.patch, cfg.objective.leaves == "classifier"
    classes = data.num_classes if head else 0  # timm's way to say that there is no classifier
    params = with_positions(params, model, data)
    rows = layout(model, data.channels, side * side, head=head)
    tensors = to_foreign(params, rows)
    pool = {"gap": "avg", "cls": "token"}[model.pooling]
    arguments = {
        "img_size": data.image_size,
        "patch_size": model.patch,
        "in_chans": data.channels,
        "num_classes": classes,
        "global_pool": pool,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.heads,
        "mlp_ratio": ratio(model.mlp_dim, model.width),
        "class_token": model.pooling == "cls",
        "no_embed_class": True,
        "fc_norm": False,
        "act_layer": GELU[model.gelu],
    }
    if model.layer_scale:
        arguments["init_values"] = model.layer_scale
    if model.registers:
        arguments["reg_tokens"] = model.registers
    pretrained = {
        "input_size": [data.channels, data.image_size, data.image_size],
        "fixed_input_size": True,
        "interpolation": INTERPOLATION[data.resize],
        "crop_pct": crop(data.image_size, data.eval_resize),
        "crop_mode": "center",
        "mean": [0.5] * data.channels,
        "std": [0.5] * data.channels,
        "num_classes": classes,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config = {
        "architecture": "vit_base_patch16_224",  # the arguments say everything that it would
        "num_classes": classes,
        "num_features": model.width,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }
    if class_names:
        config["label_names"] = list(class_names)
    return tensors, {"config.json": config}


def read(documents: dict[str, Any], arrays: dict[str, np.ndarray], file: str) -> Foreign:
    """The model that a config.json of timm's hub and the shapes of its arrays describe.

    What the model is shows in its arrays, and the rest is in the arguments. The architecture's name
    is asked for what neither tells.

    Raises:
      SetupError: it has parts that this encoder cannot express.
    """
    config = Section(documents["config.json"], file)
    name = config.values.get("architecture")
    for start, part in FOREIGN_PARTS.items():
        if found := next((x for x in arrays if x.startswith(start)), ""):
            raise SetupError(f"{file}: {name!r} has {found}, {part}, which this encoder has not.")
    args = Section(config.values.get("model_args") or {}, f"{file}, model_args")
    if unknown := sorted(set(args.values) - set(UNDERSTOOD) - set(TRAINING)):
        raise SetupError(
            f"{file}: model_args has {', '.join(unknown)}, which this encoder cannot express; "
            f"understood are {', '.join(UNDERSTOOD)}."
        )
    pretrained = Section(config.values.get("pretrained_cfg") or {}, f"{file}, pretrained_cfg")
    shape = shapes(arrays, file)
    width, channels, patch, columns = shape("patch_embed.proj.weight", 4)
    if patch != columns:
        raise SetupError(f"{file}: patches are {patch}x{columns}, expected squares.")
    cls, registers = "cls_token" in arrays, shape("reg_token", 3)[1] if "reg_token" in arrays else 0
    rows = shape("pos_embed", 3)[1]
    # Positions are of the patches alone (no_embed_class), or of the tokens before them too.
    before = cls + registers
    own = 0 if math.isqrt(rows) ** 2 == rows else before
    image_size = root(rows - own, file, "pos_embed") * patch
    pooling = _pooling(config, args, cls, arrays)
    heads, gelu = _heads_and_gelu(str(name), args, width)
    model = ViTConfig(
        patch=patch,
        width=width,
        depth=count(arrays, r"blocks\.(\d+)\..*"),
        mlp_dim=shape("blocks.0.mlp.fc1.weight", 2)[0],
        heads=heads,
        pooling=pooling,
        registers=registers,
        layer_scale=_layer_scale(arrays, args),
        gelu=gelu,
    )
    head = "head.weight" in arrays
    classes = shape("head.weight", 2)[0] if head else 0
    told = {"depth": model.depth, "embed_dim": width, "patch_size": patch, "in_chans": channels}
    told |= {"img_size": image_size, "reg_tokens": registers, "num_classes": classes}
    for field, value in told.items():
        if args.values.get(field) not in (None, value, [value, value]):
            raise SetupError(
                f"{file}: model_args has {field}={args.values[field]!r}, but the arrays beside it "
                f"are of a model with {value}."
            )
    crop_pct = pretrained.real("crop_pct", 0.875) or 1.0
    filters = {theirs: ours for ours, theirs in INTERPOLATION.items()}
    mean = pretrained.per_channel("mean", 0.5, channels, positive=False)
    std = pretrained.per_channel("std", 0.5, channels)
    return Foreign(
        model=model,
        num_classes=classes,
        image_size=image_size,
        channels=channels,
        eval_resize=math.floor(image_size / crop_pct),
        layout=layout(model, channels, rows - own, head=head, prefix=own),
        mean=mean,
        std=std,
        class_names=strings(config.values.get("label_names"), classes),
        resize=filters.get(pretrained.values.get("interpolation"), ""),
    )


def _heads_and_gelu(name: str, args: Section, width: int) -> tuple[int, str]:
    """From the arguments, else from the architecture's name.

    Raises:
      SetupError: neither tells; a guess would compute something else.
    """
    known = next((x for form, x in ARCHITECTURES.items() if re.fullmatch(form, name)), None)
    missing = [x for x in ("num_heads", "act_layer") if args.values.get(x) is None]
    if missing and known is None:
        raise SetupError(
            f"{args.file} has no {' and no '.join(missing)}, and architecture {name!r} is none "
            f"whose values are known here. Add them as that architecture has them."
        )
    heads, gelu = known or (0, "exact")
    meanings = {theirs: ours for ours, theirs in GELU.items()}
    return args.number("num_heads", heads or width // 64), args.one_of(
        "act_layer", meanings | {None: gelu}, None
    )


def _layer_scale(arrays: dict[str, np.ndarray], args: Section) -> float:
    """The first value of LayerScale, of which training alone would know; 0: there is none."""
    given = args.real("init_values", 0.0)
    return (given or 1e-5) if "blocks.0.ls1.gamma" in arrays else 0.0


def _pooling(config: Section, args: Section, cls: bool, arrays: dict[str, np.ndarray]) -> str:
    """ "cls" or "gap", if the last norm comes before the pooling, over patches alone."""
    pool = args.values.get("global_pool", config.values.get("global_pool", "token"))
    late = "fc_norm.weight" in arrays
    if pool == "token" and cls and not late:
        return "cls"
    if pool == "avg" and not cls and not late:
        return "gap"
    raise SetupError(
        f"{config.file}: global_pool is {pool!r} with{'' if cls else 'out'} a CLS token and "
        f"with{'' if late else 'out'} a norm behind it (fc_norm); this encoder has 'token' with a "
        f"CLS token, or 'avg' without, and in both its last norm before the pooling."
    )


def ratio(mlp_dim: int, width: int) -> float:
    """The mlp_ratio from which timm, int(width * ratio), gets mlp_dim."""
    found = mlp_dim / width
    return found if int(width * found) == mlp_dim else math.nextafter(found, math.inf)


def crop(image_size: int, eval_resize: int) -> float:
    """The crop_pct from which timm, floor(image_size / crop_pct), gets eval_resize."""
    found = image_size / eval_resize
    return found if math.floor(image_size / found) == eval_resize else math.nextafter(found, 0.0)
