"""timm's VisionTransformer, in the form of its hub: config.json and model.safetensors.

It expresses every model of ours: without a CLS token, with the last norm before the pooling
(fc_norm=False), a CLS token without a position (no_embed_class), LayerScale, either GELU.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from supmim_jax.config import VARIANTS, Config, ViTConfig
from supmim_jax.errors import SetupError
from supmim_jax.formats.files import Section, strings
from supmim_jax.formats.layout import (
    BLOCKS,
    Foreign,
    Layout,
    Row,
    convolution,
    linear,
    norm,
    to_foreign,
    with_positions,
)

# Pillow's filters nearest to crops.resize; its bilinear one smooths as it shrinks, ours does not.
INTERPOLATION = {"area": "box", "linear": "bilinear"}
GELU = {"exact": "gelu", "tanh": "gelu_tanh"}
SIZES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H", "giant": "g"}
ARCHITECTURE = r"vit_(tiny|small|base|large|huge|giant)_patch(\d+)_(\d+)"
# Arguments of VisionTransformer that are understood, and those that say nothing about inference.
UNDERSTOOD = (
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth"),
    *("num_heads", "mlp_ratio", "init_values", "class_token", "no_embed_class", "fc_norm"),
    "act_layer",
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
    model: ViTConfig, channels: int, positions: int, *, head: bool, cls_positions: bool
) -> Layout:
    """The rows for a model with this many patch positions, with or without a classifier."""
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
    return Layout(rows, "pos_embed" if cls_positions else "")


def write(
    params: Any, cfg: Config, class_names: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, dict]]:
    """The arrays of model.safetensors, and the JSON documents beside it by name."""
    model, data = cfg.model, cfg.data
    side, head = data.image_size // model.patch, cfg.objective.leaves == "classifier"
    classes = data.num_classes if head else 0  # timm's way to say that there is no classifier
    params = with_positions(params, model, data)
    rows = layout(model, data.channels, side * side, head=head, cls_positions=False)
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


def read(documents: dict[str, Any], file: str) -> Foreign:
    """The model that a config.json of timm's hub describes.

    Raises:
      SetupError: it is of another kind, or has parts that this encoder cannot express.
    """
    config = Section(documents["config.json"], file)
    name = config.values.get("architecture")
    match = re.fullmatch(ARCHITECTURE, name) if isinstance(name, str) else None
    if match is None:
        raise SetupError(
            f"{file}: architecture is {name!r}, expected a plain ViT of timm: {ARCHITECTURE}"
        )
    args = Section(config.values.get("model_args") or {}, f"{file}, model_args")
    if unknown := sorted(set(args.values) - set(UNDERSTOOD) - set(TRAINING)):
        raise SetupError(
            f"{file}: model_args has {', '.join(unknown)}, which this encoder cannot express; "
            f"understood are {', '.join(UNDERSTOOD)}."
        )
    pretrained = Section(config.values.get("pretrained_cfg") or {}, f"{file}, pretrained_cfg")
    for key in ("mean", "std"):
        pretrained.same(key, 0.5, None, "this encoder sees pixels / 127.5 - 1.")
    usual, depth, mlp_dim, heads = VARIANTS[SIZES[match[1]]]
    width = args.number("embed_dim", usual)
    image_size = args.number("img_size", int(match[3]))
    pooling = _pooling(config, args)
    model = ViTConfig(
        patch=args.number("patch_size", int(match[2])),
        width=width,
        depth=args.number("depth", depth),
        mlp_dim=int(width * args.real("mlp_ratio", ratio(mlp_dim, usual))),
        heads=args.number("num_heads", heads),
        pooling=pooling,
        layer_scale=args.real("init_values", 0.0),
        gelu=args.one_of("act_layer", {"gelu": "exact", "gelu_tanh": "tanh", None: "exact"}, None),
    )
    channels = args.number("in_chans", 3)
    classes = args.number("num_classes", config.values.get("num_classes"), least=0)
    without = args.one_of("no_embed_class", {True: True, False: False}, False)
    crop_pct = pretrained.real("crop_pct", 0.875) or 1.0
    filters = {name: ours for ours, name in INTERPOLATION.items()}
    return Foreign(
        model=model,
        num_classes=classes,
        image_size=image_size,
        channels=channels,
        eval_resize=math.floor(image_size / crop_pct),
        layout=layout(
            model,
            channels,
            (image_size // model.patch) ** 2,
            head=classes > 0,
            cls_positions=pooling == "cls" and not without,
        ),
        class_names=strings(config.values.get("label_names"), classes),
        resize=filters.get(pretrained.values.get("interpolation"), ""),
    )


def _pooling(config: Section, args: Section) -> str:
    """ "cls" or "gap", if the last norm comes before the pooling, over patches alone."""
    pool = args.values.get("global_pool", config.values.get("global_pool", "token"))
    cls, late = args.values.get("class_token", True), args.values.get("fc_norm")
    if pool == "token" and cls and not late:
        return "cls"
    if pool == "avg" and not cls and late is False:
        return "gap"
    raise SetupError(
        f"{config.file}: global_pool is {pool!r} with class_token={cls} and fc_norm={late}; this "
        f"encoder has 'token' with class_token=True, or 'avg' with class_token=False, and in both "
        f"its last norm before the pooling (fc_norm=False)."
    )


def ratio(mlp_dim: int, width: int) -> float:
    """The mlp_ratio from which timm, int(width * ratio), gets mlp_dim."""
    found = mlp_dim / width
    return found if int(width * found) == mlp_dim else math.nextafter(found, math.inf)


def crop(image_size: int, eval_resize: int) -> float:
    """The crop_pct from which timm, floor(image_size / crop_pct), gets eval_resize."""
    found = image_size / eval_resize
    return found if math.floor(image_size / found) == eval_resize else math.nextafter(found, 0.0)
