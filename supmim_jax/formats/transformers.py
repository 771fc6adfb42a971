"""The ViTs of transformers that match ours: model types `vit`, `ijepa`, and `vit_mae` to read.

`vit` always has a CLS token and classifies from it. `ijepa` has none and classifies from the mean
of its normalised tokens, which is our average pooling. Neither has LayerScale, so it is multiplied
into the layers before it. We write the names that save_pretrained writes; transformers 5 renames
them when it loads. An encoder by itself (ViTModel, IJepaModel, ViTMAEModel) has no prefix in its
names. `vit_mae` is a `vit` trained by MAE, without a classifier; we leave out its decoder.
"""

from collections.abc import Sequence
from typing import Any

from supmim_jax.config import Config, ViTConfig
from supmim_jax.errors import SetupError
from supmim_jax.formats import layout
from supmim_jax.formats.files import CONFIG, PROCESSOR, Saved, Section, strings
from supmim_jax.formats.layout import BLOCKS, Foreign, Row, linear, norm

GELU = {"exact": "gelu", "tanh": "gelu_pytorch_tanh"}
KNOWN_GELU = {"gelu": "exact", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh"}
TYPES = {"cls": "vit", "gap": "ijepa"}
CLASSIFIERS = {"cls": "ViTForImageClassification", "gap": "IJepaForImageClassification"}
ENCODERS = {"cls": "ViTModel", "gap": "IJepaModel"}
MAE, MAE_ENCODER = "vit_mae", "ViTMAEModel"
NO_ENCODER = ("pooler.", "decoder.")  # a layer after the CLS token; what predicts masked patches
# Pillow's numbers of the filters nearest to transforms.resize: box and bilinear (see timm.py).
RESAMPLE = {"area": 4, "linear": 2}
EPSILON = 1e-6


def rows(model: ViTConfig, channels: int, head: bool, root: str) -> tuple[Row, ...]:
    """The table of a model; `root` is before the encoder's names."""
    embeddings, block, width = f"{root}embeddings", f"{root}encoder.layer.{{}}", model.width
    attention = f"{block}.attention.attention"
    found = [
        *layout.convolution(f"{embeddings}.patch_embeddings.projection", model, channels),
        Row(layout.POSITIONS, (f"{embeddings}.position_embeddings",), (1, -1, width)),
        *norm(f"{BLOCKS}/norm1", f"{block}.layernorm_before"),
        *linear(f"{BLOCKS}/qkv", f"{attention}.query", f"{attention}.key", f"{attention}.value"),
        *linear(f"{BLOCKS}/out", f"{block}.attention.output.dense"),
        *norm(f"{BLOCKS}/norm2", f"{block}.layernorm_after"),
        *linear(f"{BLOCKS}/fc1", f"{block}.intermediate.dense"),
        *linear(f"{BLOCKS}/fc2", f"{block}.output.dense"),
        *norm("encoder/norm", f"{root}layernorm"),
    ]
    if head:
        found += linear("head", "classifier")
    if model.pooling == "cls":
        found.append(Row(layout.CLS, (f"{embeddings}.cls_token",), (1, 1, width)))
    return tuple(found)


def write(
    params: Any, cfg: Config, class_names: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, dict]]:
    """The arrays of model.safetensors, and the JSON documents beside it by name."""
    model, data = cfg.model, cfg.data
    if model.registers:
        raise SetupError(
            f"config.model.registers is {model.registers}, which transformers' ViT cannot express: "
            f"export to timm."
        )
    head = cfg.objective.leaves == "classifier"
    root = f"{TYPES[model.pooling]}." if head else ""
    params = layout.without_layer_scale(layout.with_positions(params, model, data))
    prefix = int(model.pooling == "cls")  # their CLS token has a position
    tensors = layout.to_foreign(params, rows(model, data.channels, head, root), prefix)
    config = {
        "architectures": [(CLASSIFIERS if head else ENCODERS)[model.pooling]],
        "model_type": TYPES[model.pooling],
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": model.mlp_dim,
        "hidden_act": GELU[model.gelu],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": EPSILON,
        "image_size": data.image_size,
        "patch_size": model.patch,
        "num_channels": data.channels,
        "qkv_bias": True,
    }
    if head:
        labels = class_names or [f"LABEL_{i}" for i in range(data.num_classes)]
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    processor = {
        "image_processor_type": "BitImageProcessor",  # the plain resize, crop and normalise
        "do_convert_rgb": data.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": data.eval_resize},
        "resample": RESAMPLE[data.resize],
        "do_center_crop": True,
        "crop_size": {"height": data.image_size, "width": data.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * data.channels,
        "image_std": [0.5] * data.channels,
    }
    return tensors, {CONFIG: config, PROCESSOR: processor}


def read(saved: Saved) -> Foreign:
    """The model that a config.json describes; raises SetupError if it cannot be one of ours."""
    config, processor = saved.config, saved.processor
    kinds = {name: pool for pool, name in TYPES.items()} | {MAE: "cls"}
    pooling = config.one_of("model_type", kinds, None)
    architectures = config.get("architectures", [])
    if config.values["model_type"] == MAE:
        head, root = False, "" if MAE_ENCODER in architectures else "vit."
    elif ENCODERS[pooling] in architectures:
        head, root = False, ""
    else:
        head, root = True, f"{TYPES[pooling]}."
    config.same("qkv_bias", True, True, "this encoder's attention has biases")
    config.same(
        "layer_norm_eps",
        EPSILON,
        1e-12,
        "this encoder's. Google's ViTs and MAE's were trained with it, though their conversions "
        "say 1e-12: for those, write 1e-06 into config.json",
    )
    model = ViTConfig(
        patch=config.integer("patch_size", 16),
        width=config.integer("hidden_size", 768),
        depth=config.integer("num_hidden_layers", 12),
        mlp_dim=config.integer("intermediate_size", 3072),
        heads=config.integer("num_attention_heads", 12),
        pooling=pooling,
        gelu=config.one_of("hidden_act", KNOWN_GELU, "gelu"),
    )
    image_size, channels = config.integer("image_size", 224), config.integer("num_channels", 3)
    labels = config.get("id2label", {})
    classes = config.integer("num_labels", len(labels) or 2) if head else 0  # 2: their own default
    eval_resize = image_size
    if processor.values.get("do_center_crop"):
        eval_resize = processor.section("size").integer("shortest_edge", image_size)
    mean, std = _pixels(processor, channels)
    resample = processor.values.get("resample")
    return Foreign(
        model=model,
        num_classes=classes,
        image_size=image_size,
        channels=channels,
        eval_resize=eval_resize,
        rows=rows(model, channels, head, root),
        prefix=int(pooling == "cls"),
        leaves_out=() if head else NO_ENCODER,
        mean=mean,
        std=std,
        class_names=strings(list(labels.values()) if isinstance(labels, dict) else labels, classes),
        resize=next((ours for ours, number in RESAMPLE.items() if number == resample), ""),
    )


def _pixels(processor: Section, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels in [0, 1] that amount to what the processor does."""
    for key in ("do_flip_channel_order", "rescale_offset", "offset"):
        processor.same(key, False, False, "this encoder sees RGB and no other offset of pixels")
    mean = processor.reals("image_mean", 0.5, channels)
    std = processor.reals("image_std", 0.5, channels, positive=True)
    if not processor.flag("do_normalize", True):
        mean, std = (0.0,), (1.0,)
    # (255 p f - mean) / std with pixels p in [0, 1] and the factor f is (p - mean / 255 f) / ...
    factor = 255 * processor.real("rescale_factor", 1 / 255, positive=True)
    if not processor.flag("do_rescale", True):
        factor = 255.0
    return tuple(x / factor for x in mean), tuple(x / factor for x in std)
