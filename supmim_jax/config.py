"""The schema of an experiment: frozen dataclasses with their ranges.

Derived values are properties, so that an override on the command line changes everything that
follows from it. `configdict.py` is the door between these and ml_collections.
"""

from dataclasses import dataclass, field
from typing import Literal


class SetupError(Exception):
    """Something the person who launched the run can fix; commands print it and exit with 2."""


class ConfigError(SetupError):
    """A config value that cannot be used; the message names its path and the alternatives."""


def within(default, low, high):
    """A number field that must lie in [low, high]."""
    return field(default=default, metadata={"range": (low, high)})


INF = float("inf")


@dataclass(frozen=True)
class DataConfig:
    name: str = "fractals/tiny"  # a tfds name; `fractals` is built on first use
    data_dir: str = ""  # "" is tfds's own default (TFDS_DATA_DIR, else ~/tensorflow_datasets)
    train_split: str = "train"
    eval_split: str = "validation"
    train_examples: int = within(240, 1, INF)  # checked against the data set when it is opened
    num_classes: int = within(30, 2, INF)
    image_size: int = within(20, 1, INF)  # pixels, what the encoder sees
    channels: Literal[1, 3] = 1
    crop: Literal["inception", "random"] = "random"
    min_crop_area: float = within(0.05, 0.0, 1.0)  # inception crop: least share of the area
    flip: bool = True
    augment: Literal["none", "rand_augment", "three_augment"] = "none"
    augment_layers: int = within(2, 1, 8)  # rand_augment: operations per image
    augment_magnitude: float = within(15.0, 0.0, 30.0)  # rand_augment: 10 is AutoAugment's most
    color_jitter: float = within(0.3, 0.0, 1.0)  # three_augment: brightness, contrast, saturation
    eval_resize: int = within(24, 1, INF)  # pixels of the shorter side before the centre crop
    workers: int = within(0, 0, 256)  # decoding processes per host, a batch each; 0: threads
    threads: int = within(2, 1, 256)  # reading (and, with 0 workers, decoding) threads
    prefetch: int = within(4, 1, 1024)  # batches kept ready; at least one per thread

    def __post_init__(self):
        if self.eval_resize < self.image_size:
            raise ConfigError(
                f"eval_resize is {self.eval_resize}, but the centre crop needs at least "
                f"image_size = {self.image_size}."
            )
        if self.augment != "none" and self.channels != 3:
            raise ConfigError(
                f"augment is {self.augment!r}, which needs channels = 3, not {self.channels}."
            )


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
    patch: int = within(4, 1, INF)  # pixels
    width: int = within(64, 1, INF)
    depth: int = within(4, 1, INF)
    mlp_dim: int = within(256, 1, INF)
    heads: int = within(2, 1, INF)
    pooling: Literal["gap", "cls"] = "gap"
    positions: Literal["learned", "sincos2d"] = "learned"
    layer_scale: float = within(0.0, 0.0, 1.0)  # initial value; 0 leaves LayerScale out
    drop_path: float = within(0.0, 0.0, 0.99)  # of the last block, rising linearly from 0
    gelu: Literal["exact", "tanh"] = "exact"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters are float32
    remat: Literal["none", "names", "full"] = "none"

    def __post_init__(self):
        if self.width % self.heads:
            raise ConfigError(f"width is {self.width}, not a multiple of heads = {self.heads}.")
        if self.positions == "sincos2d" and self.width % 4:
            raise ConfigError(f"width is {self.width}; sincos2d positions need a multiple of 4.")

    @classmethod
    def variant(cls, name: str, **fields) -> "ViTConfig":
        """ViTConfig of a published size (a key of VARIANTS); `fields` sets the rest."""
        width, depth, mlp_dim, heads = VARIANTS[name]
        return cls(width=width, depth=depth, mlp_dim=mlp_dim, heads=heads, **fields)


@dataclass(frozen=True)
class ClassificationConfig:
    # sigmoid: binary cross-entropy of soft targets; bce: DeiT-III's, every mixed-in label is 1
    loss: Literal["softmax", "sigmoid", "bce"] = "softmax"
    label_smoothing: float = within(0.0, 0.0, 0.99)
    mixup: float = within(0.0, 0.0, INF)  # Beta parameter; 0 switches it off
    cutmix: float = within(0.0, 0.0, INF)  # Beta parameter; with mixup on, a coin per batch

    def __post_init__(self):
        if self.loss == "bce" and self.label_smoothing:
            raise ConfigError(
                "label_smoothing must be 0 with loss = 'bce': its targets are 0 or 1."
            )


@dataclass(frozen=True)
class SupervisedConfig:
    name: Literal["supervised"] = "supervised"
    classification: ClassificationConfig = ClassificationConfig()


@dataclass(frozen=True)
class DecoderConfig:
    depth: int = within(1, 1, INF)
    width: int = within(64, 1, INF)
    mlp_dim: int = within(256, 1, INF)
    heads: int = within(2, 1, INF)

    def __post_init__(self):
        if self.width % self.heads or self.width % 4:
            raise ConfigError(
                f"width is {self.width}; it must be a multiple of heads = {self.heads} and of 4."
            )


@dataclass(frozen=True)
class PatchCodesConfig:
    name: Literal["patch_codes"] = "patch_codes"
    codes: int = within(64, 2, 65535)  # k of k-means; ids fit uint16
    normalize: Literal["raw", "luminance"] = "raw"
    fit_images: int = within(240, 1, INF)  # first images of the training split
    path: str = ""  # a saved codebook (.npz); "" fits one on the training split


@dataclass(frozen=True)
class SupMIMConfig:
    name: Literal["supmim"] = "supmim"
    classification: ClassificationConfig = ClassificationConfig()
    mask_ratio: float = within(0.5, 0.01, 0.99)  # share of the patches that are masked
    mask_form: Literal["random", "block"] = "random"
    encoder_input: Literal["masked", "visible"] = "masked"  # mask embeddings, or kept patches only
    mim_weight: float = within(1.0, 0.0, INF)
    decoder: DecoderConfig = DecoderConfig()
    tokenizer: PatchCodesConfig = PatchCodesConfig()


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "lamb"] = "adamw"
    lr: float = within(1e-3, 0.0, INF)  # at lr_batch; see Config.peak_lr
    lr_batch: int = within(0, 0, INF)  # 0: lr is the peak itself; else scaled by batch / lr_batch
    final_lr: float = within(0.0, 0.0, INF)  # at the end of the cosine
    warmup_epochs: float = within(5.0, 0.0, INF)
    weight_decay: float = within(0.05, 0.0, INF)  # decoupled, times the learning rate; matrices
    b1: float = within(0.9, 0.0, 1.0)
    b2: float = within(0.999, 0.0, 1.0)
    clip: float = within(1.0, 0.0, INF)  # global gradient norm; 0 switches it off


@dataclass(frozen=True)
class MeshConfig:
    data: int = within(0, 0, INF)  # 0: all devices that the other axes leave
    fsdp: int = within(1, 1, INF)
    tensor: int = within(1, 1, INF)


@dataclass(frozen=True)
class EvalConfig:
    every: int = within(0, 0, INF)  # steps; 0 evaluates at the end only
    batch_size: int = within(256, 1, INF)
    knn_k: int = within(20, 1, INF)
    knn_temperature: float = within(0.07, 1e-6, INF)


@dataclass(frozen=True)
class LogConfig:
    every: int = within(50, 1, INF)  # steps between lines of metrics.jsonl
    tensorboard: bool = False  # also events and profiles for TensorBoard, by clu and TensorFlow


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = within(500, 1, INF)  # steps
    keep: int = within(2, 1, INF)  # newest ones kept


@dataclass(frozen=True)
class Config:
    seed: int = within(0, 0, 2**31 - 1)
    batch_size: int = within(64, 1, INF)  # global
    epochs: float = within(1.0, 0.0, INF)
    data: DataConfig = DataConfig()
    model: ViTConfig = ViTConfig()
    objective: SupervisedConfig | SupMIMConfig = SupMIMConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self):
        size, patch = self.data.image_size, self.model.patch
        if size % patch:
            below = size - size % patch
            raise ConfigError(
                f"data.image_size is {size}, not a multiple of model.patch = {patch}; "
                f"{below or patch} or {below + patch} would do."
            )
        if self.objective.name == "supmim" and size == patch:
            raise ConfigError(f"model.patch is {patch}, the whole image: nothing is left to mask.")

    @property
    def total_steps(self) -> int:
        return max(1, round(self.epochs * self.data.train_examples / self.batch_size))

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up, at least one short of the whole run."""
        steps = round(self.optim.warmup_epochs * self.data.train_examples / self.batch_size)
        return min(steps, self.total_steps - 1)

    @property
    def peak_lr(self) -> float:
        scale = self.batch_size / self.optim.lr_batch if self.optim.lr_batch else 1.0
        return self.optim.lr * scale
