"""timm's VisionTransformer as its hub stores it: config.json and model.safetensors.

It can express every model of ours: no CLS token, the last norm before the pooling (fc_norm=False),
a CLS token without a position (no_embed_class), LayerScale, and both forms of GELU.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from supmim_jax.config import Config, ViTConfig
from supmim_jax.errors import SetupError
from supmim_jax.formats import layout
from supmim_jax.formats.files import CONFIG, Saved, Section, strings
from supmim_jax.formats.layout import BLOCKS, Foreign, Row, linear, norm

# Pillow's filters nearest to transforms.resize; its bilinear one smooths as it shrinks, ours
# does not.
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


def rows(model: ViTConfig, channels: int, head: bool) -> tuple[Row, ...]:
    """The table of a model."""
    width, block = model.width, "blocks.{}"
    found = [
        *layout.convolution("patch_embed.proj", model, channels),
        Row(layout.POSITIONS, ("pos_embed",), (1, -1, width)),
        *norm(f"{BLOCKS}/norm1", f"{block}.norm1"),
        *linear(f"{BLOCKS}/qkv", f"{block}.attn.qkv"),
        *linear(f"{BLOCKS}/out", f"{block}.attn.proj"),
        *norm(f"{BLOCKS}/norm2", f"{block}.norm2"),
        *linear(f"{BLOCKS}/fc1", f"{block}.mlp.fc1"),
        *linear(f"{BLOCKS}/fc2", f"{block}.mlp.fc2"),
        *norm("encoder/norm", "norm"),
    ]
    if head:
        found += linear("head", "head")
    if model.layer_scale:
        found += [Row(f"{BLOCKS}/scale{i}", (f"{block}.ls{i}.gamma",)) for i in (1, 2)]
    if model.pooling == "cls":
        found.append(Row(layout.CLS, ("cls_token",), (1, 1, width)))
    if model.registers:
        found.append(Row(layout.REGISTERS, ("reg_token",), (1, model.registers, width)))
    return tuple(found)


def write(
    params: Any, cfg: Config, class_names: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, dict]]:
    """The arrays of model.safetensors, and the JSON documents beside it by name."""
    model, data = cfg.model, cfg.data
    head = cfg.objective.leaves == "classifier"
    classes = data.num_classes if head else 0  # timm's way to say that there is no classifier
    params = layout.with_positions(params, model, data)
    tensors = layout.to_foreign(params, rows(model, data.channels, head))
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
    return tensors, {CONFIG: config}


def read(saved: Saved) -> Foreign:
    """The model that a config.json of timm's hub and the shapes of its arrays describe.

    What the model is shows in its arrays, and the rest is in the arguments. The architecture's name
    is asked for what neither tells.

    Raises:
      SetupError: it has parts that this encoder cannot express.
    """
    file, arrays, config, _ = saved
    name = str(config.values.get("architecture"))
    for start, part in FOREIGN_PARTS.items():
        if found := next((x for x in arrays if x.startswith(start)), ""):
            raise SetupError(f"{file}: {name!r} has {found}, {part}, which this encoder has not.")
    args, pretrained = config.section("model_args"), config.section("pretrained_cfg")
    if unknown := sorted(set(args.values) - set(UNDERSTOOD) - set(TRAINING)):
        raise SetupError(
            f"{args.file} has {', '.join(unknown)}, which this encoder cannot express; "
            f"understood are {', '.join(UNDERSTOOD)}."
        )
    shape = layout.shapes(arrays, file)
    width, channels, patch, columns = shape("patch_embed.proj.weight", 4)
    if patch != columns:
        raise SetupError(f"{file}: patches are {patch}x{columns}, expected squares.")
    cls, registers = "cls_token" in arrays, shape("reg_token", 3)[1] if "reg_token" in arrays else 0
    side, prefix = layout.grid(shape("pos_embed", 3)[1], cls + registers, file, "pos_embed")
    image_size = side * patch
    heads, gelu = _heads_and_gelu(name, args, width)
    layer_scale = args.real("init_values", 0.0) or 1e-5  # at the start of training: it is not known
    model = ViTConfig(
        patch=patch,
        width=width,
        depth=layout.count(arrays, r"blocks\.(\d+)\..*"),
        mlp_dim=shape("blocks.0.mlp.fc1.weight", 2)[0],
        heads=heads,
        pooling=_pooling(config, args, cls, "fc_norm.weight" in arrays),
        registers=registers,
        layer_scale=layer_scale if "blocks.0.ls1.gamma" in arrays else 0.0,
        gelu=gelu,
    )
    classes = shape("head.weight", 2)[0] if "head.weight" in arrays else 0
    told = {"depth": model.depth, "embed_dim": width, "patch_size": patch, "in_chans": channels}
    told |= {"img_size": image_size, "reg_tokens": registers, "num_classes": classes}
    for field, value in told.items():
        if args.values.get(field) not in (None, value, [value, value]):
            raise SetupError(
                f"{args.file}: {field} is {args.values[field]!r}, but {file} holds a model with "
                f"{value}."
            )
    resize = pretrained.values.get("interpolation")
    return Foreign(
        model=model,
        num_classes=classes,
        image_size=image_size,
        channels=channels,
        eval_resize=math.floor(image_size / (pretrained.real("crop_pct", 0.875) or 1.0)),
        rows=rows(model, channels, head=classes > 0),
        prefix=prefix,
        mean=pretrained.reals("mean", 0.5, channels),
        std=pretrained.reals("std", 0.5, channels, positive=True),
        class_names=strings(config.values.get("label_names"), classes),
        resize=next((ours for ours, theirs in INTERPOLATION.items() if theirs == resize), ""),
    )


def _heads_and_gelu(name: str, args: Section, width: int) -> tuple[int, str]:
    """From the arguments, else from the architecture's name; raises SetupError if neither tells."""
    known = next((x for form, x in ARCHITECTURES.items() if re.fullmatch(form, name)), None)
    missing = [x for x in ("num_heads", "act_layer") if args.values.get(x) is None]
    if missing and known is None:
        raise SetupError(
            f"{args.file} has no {' and no '.join(missing)}, and architecture {name!r} is none "
            f"whose values are known here. Add them as that architecture has them."
        )
    heads, gelu = known or (0, "exact")
    meanings = {theirs: ours for ours, theirs in GELU.items()} | {None: gelu}
    return args.integer("num_heads", heads or width // 64), args.one_of("act_layer", meanings, None)


def _pooling(config: Section, args: Section, cls: bool, late: bool) -> str:
    """ "cls" or "gap", if the last norm comes before the pooling, over patches alone."""
    pool = args.values.get("global_pool", config.values.get("global_pool", "token"))
    found = {("token", True): "cls", ("avg", False): "gap"}.get((str(pool), cls))
    if late or not found:
        raise SetupError(
            f"{config.file}: global_pool is {pool!r} with{'' if cls else 'out'} a CLS token and "
            f"with{'' if late else 'out'} a norm behind it (fc_norm); this encoder has 'token' "
            f"with a CLS token, or 'avg' without, and in both its last norm before the pooling."
        )
    return found


def ratio(mlp_dim: int, width: int) -> float:
    """The mlp_ratio from which timm, int(width * ratio), gets mlp_dim."""
    found = mlp_dim / width
    return found if int(width * found) == mlp_dim else math.nextafter(found, math.inf)


def crop(image_size: int, eval_resize: int) -> float:
    """The crop_pct from which timm, floor(image_size / crop_pct), gets eval_resize."""
    found = image_size / eval_resize
    return found if math.floor(image_size / found) == eval_resize else math.nextafter(found, 0.0)
