"""The ViTs of transformers that are ours: model types `vit` and `ijepa`, and to read `vit_mae`.

`vit` always has a CLS token and classifies from it. `ijepa` has none, and classifies from the mean
of its normalised tokens: our average pooling. Neither has LayerScale, which is multiplied into the
layers before it. Names are those that save_pretrained writes; transformers 5 renames them on load.
The encoder by itself (ViTModel, IJepaModel, ViTMAEModel) has no prefix before its names. `vit_mae`
is a `vit` that MAE has trained; it has no classifier, and its decoder is left out.
"""

from collections.abc import Sequence
from typing import Any

from supmim_jax.config import Config, ViTConfig
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
    without_layer_scale,
)

GELU = {"exact": "gelu", "tanh": "gelu_pytorch_tanh"}
KNOWN_GELU = {"gelu": "exact", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh"}
TYPES = {"cls": "vit", "gap": "ijepa"}
CLASSIFIERS = {"cls": "ViTForImageClassification", "gap": "IJepaForImageClassification"}
ENCODERS = {"cls": "ViTModel", "gap": "IJepaModel"}
MAE, MAE_ENCODER = "vit_mae", "ViTMAEModel"
NO_ENCODER = ("pooler.", "decoder.")  # a layer after the CLS token; what predicts masked patches
# Pillow's numbers of the filters nearest to crops.resize: box and bilinear (see timm_vit.py).
RESAMPLE = {"area": 4, "linear": 2}
EPSILON = 1e-6


def layout(model: ViTConfig, channels: int, positions: int, *, head: bool, root: str) -> Layout:
    """The rows for a model with this many patch positions; `root` is before the encoder's names."""
    layer, width = f"{root}encoder.layer.{{}}", model.width
    attention = f"{layer}.attention.attention"
    rows = (
        *convolution(f"{root}embeddings.patch_embeddings.projection", model.patch, channels, width),
        Row(
            "encoder/positions",
            (f"{root}embeddings.position_embeddings",),
            shape=(1, positions, width),
        ),
        *norm(f"{BLOCKS}/norm1", f"{layer}.layernorm_before"),
        *linear(f"{BLOCKS}/qkv", f"{attention}.query", f"{attention}.key", f"{attention}.value"),
        *linear(f"{BLOCKS}/out", f"{layer}.attention.output.dense"),
        *norm(f"{BLOCKS}/norm2", f"{layer}.layernorm_after"),
        *linear(f"{BLOCKS}/fc1", f"{layer}.intermediate.dense"),
        *linear(f"{BLOCKS}/fc2", f"{layer}.output.dense"),
        *norm("encoder/norm", f"{root}layernorm"),
    )
    if head:
        rows += linear("head", "classifier")
    if model.pooling == "gap":
        return Layout(rows)
    cls = Row("encoder/cls", (f"{root}embeddings.cls_token",), shape=(1, 1, width))
    return Layout((*rows, cls), f"{root}embeddings.position_embeddings")


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
    side, head = data.image_size // model.patch, cfg.objective.leaves == "classifier"
    root = f"{TYPES[model.pooling]}." if head else ""
    params = with_positions(params, model, data)
    params = without_layer_scale(params)
    tensors = to_foreign(params, layout(model, data.channels, side * side, head=head, root=root))
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
    return tensors, {"config.json": config, "preprocessor_config.json": processor}


def read(documents: dict[str, Any], arrays: dict[str, Any], file: str) -> Foreign:
    """The model that a config.json of transformers describes.

    Raises:
      SetupError: it is of another kind, or has parts that this encoder cannot express.
    """
    config = Section(documents["config.json"], file)
    kinds = {name: pool for pool, name in TYPES.items()} | {MAE: "cls"}
    pooling = config.one_of("model_type", kinds, None)
    head, root = _parts(config, pooling)
    config.same("qkv_bias", True, True, "this encoder's attention has biases.")
    config.same(
        "layer_norm_eps",
        EPSILON,
        1e-12,
        "this encoder's. Google's ViTs and MAE's were trained with it, though their conversions "
        "say 1e-12: for those, write 1e-06 into config.json.",
    )
    model = ViTConfig(
        patch=config.number("patch_size", 16),
        width=config.number("hidden_size", 768),
        depth=config.number("num_hidden_layers", 12),
        mlp_dim=config.number("intermediate_size", 3072),
        heads=config.number("num_attention_heads", 12),
        pooling=pooling,
        gelu=config.one_of("hidden_act", KNOWN_GELU, "gelu"),
    )
    image_size, channels = config.number("image_size", 224), config.number("num_channels", 3)
    labels = config.values.get("id2label") or {}
    classes = config.number("num_labels", len(labels) or 2) if head else 0  # 2: their own default
    eval_resize, mean, std = _processor(documents, image_size, channels, file)
    positions = (image_size // model.patch) ** 2
    processor = documents.get("preprocessor_config.json")
    processor = processor if isinstance(processor, dict) else {}
    filters = {number: ours for ours, number in RESAMPLE.items()}
    return Foreign(
        model=model,
        num_classes=classes,
        image_size=image_size,
        channels=channels,
        eval_resize=eval_resize,
        layout=layout(model, channels, positions, head=head, root=root),
        leaves_out=() if head else NO_ENCODER,
        mean=mean,
        std=std,
        class_names=strings(list(labels.values()) if isinstance(labels, dict) else labels, classes),
        resize=filters.get(processor.get("resample"), ""),
    )


def _parts(config: Section, pooling: str) -> tuple[bool, str]:
    """Whether there is a classifier, and what is before the names of the encoder's arrays."""
    classes = config.values.get("architectures") or []
    if config.values["model_type"] == MAE:
        return False, "" if MAE_ENCODER in classes else "vit."
    if ENCODERS[pooling] in classes:
        return False, ""
    return True, f"{TYPES[pooling]}."


def _processor(
    documents: dict[str, Any], image_size: int, channels: int, file: str
) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """The shorter side before the centre crop (without one the image's own), mean and deviation."""
    processor = Section(
        documents.get("preprocessor_config.json") or {}, f"{file}, preprocessor_config.json"
    )
    for key in ("do_flip_channel_order", "rescale_offset", "offset"):
        processor.same(key, False, False, "this encoder sees RGB and no other offset of pixels.")
    mean, std = (processor.per_channel(f"image_{x}", 0.5, channels) for x in ("mean", "std"))
    if not processor.flag("do_normalize", True):
        mean, std = (0.0,), (1.0,)
    # (255 p f - mean) / std with pixels p in [0, 1] and the factor f is (p - mean / 255 f) / ...
    factor = 255 * processor.real("rescale_factor", 1 / 255)
    if not processor.flag("do_rescale", True):
        factor = 255.0
    if not factor:
        raise SetupError(
            f"{processor.file}: rescale_factor is 0, which leaves nothing of an image."
        )
    mean, std = (tuple(x / factor for x in of) for of in (mean, std))
    if not processor.values.get("do_center_crop"):
        return image_size, mean, std
    size = Section(processor.values.get("size"), f"{processor.file}, size")
    return size.number("shortest_edge", image_size), mean, std
