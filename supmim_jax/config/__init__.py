"""The schema of an experiment: frozen dataclasses with their ranges.

Derived values are properties, so that an override on the command line changes everything that
follows from it. `configdict.py` is the door between these and ml_collections.
"""

import math
from dataclasses import dataclass
from typing import Literal

from supmim_jax.config.data import IGNORED, DataConfig, MasksConfig, ProbeDataConfig
from supmim_jax.config.evaluation import (
    EvalConfig,
    FewShotConfig,
    HeadTrainingConfig,
    KNNConfig,
    LinearProbeConfig,
    RetrievalConfig,
    SegmentationConfig,
)
from supmim_jax.config.fields import INF, ConfigError, SetupError, within
from supmim_jax.config.model import VARIANTS, DecoderConfig, ViTConfig
from supmim_jax.config.objective import (
    AdversarialConfig,
    ClassificationConfig,
    PerceptualConfig,
    SegmentationObjectiveConfig,
    SupervisedConfig,
    SupMIMConfig,
    VQGANObjectiveConfig,
)
from supmim_jax.config.tokenizer import (
    PatchCodesConfig,
    PixelsConfig,
    TokensConfig,
    VQGANConfig,
)

__all__ = [
    "IGNORED",
    "INF",
    "VARIANTS",
    "AdversarialConfig",
    "CheckpointConfig",
    "ClassificationConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DecoderConfig",
    "EvalConfig",
    "FewShotConfig",
    "HeadTrainingConfig",
    "InitConfig",
    "KNNConfig",
    "LinearProbeConfig",
    "LogConfig",
    "MasksConfig",
    "MeshConfig",
    "OptimConfig",
    "PatchCodesConfig",
    "PerceptualConfig",
    "PixelsConfig",
    "ProbeConfig",
    "ProbeDataConfig",
    "RetrievalConfig",
    "SegmentationConfig",
    "SegmentationObjectiveConfig",
    "SetupError",
    "SupMIMConfig",
    "SupervisedConfig",
    "TokensConfig",
    "VQGANConfig",
    "VQGANObjectiveConfig",
    "ViTConfig",
    "within",
]


@dataclass(frozen=True)
class InitConfig:
    """What the first step starts from; a run that has a checkpoint of its own goes on from that."""

    checkpoint: str = ""  # workdir[@step] of a run whose encoder to take; "" draws one
    head: Literal["new", "keep"] = "new"  # keep: the checkpoint's head too, of as many classes

    def __post_init__(self):
        if self.head == "keep" and not self.checkpoint:
            raise ConfigError(
                "head is 'keep', but checkpoint names no run to take it from: give its --workdir, "
                "or set head to 'new'."
            )


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
    layer_decay: float = within(1.0, 0.0, 1.0)  # of the rate, per encoder layer from the top
    accumulate: int = within(1, 1, INF)  # micro-batches whose gradients make one step


@dataclass(frozen=True)
class MeshConfig:
    data: int = within(0, 0, INF)  # 0: all devices that the other axes leave
    fsdp: int = within(1, 1, INF)
    tensor: int = within(1, 1, INF)
    # TPU slices (or other groups with a fast network of their own); `data` runs across them, and
    # what crosses the slow network between them is one reduction of gradients per step.
    slices: int = within(1, 1, INF)


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
    objective: (
        SupervisedConfig | SupMIMConfig | SegmentationObjectiveConfig | VQGANObjectiveConfig
    ) = SupMIMConfig()
    tokens: TokensConfig = TokensConfig()
    init: InitConfig = InitConfig()
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
        if self.objective.name == "vqgan" and size % self.objective.tokenizer.downsampling:
            raise ConfigError(
                f"data.image_size is {size}, but {len(self.objective.tokenizer.multipliers)} "
                f"objective.tokenizer.multipliers make tokens of "
                f"{self.objective.tokenizer.downsampling} pixels; it must be a multiple of that."
            )
        if self.objective.name == "vqgan" and self.optim.layer_decay != 1.0:
            raise ConfigError(
                "optim.layer_decay must be 1 with objective 'vqgan': it is for the layers of an "
                "encoder that is trained, and there is none."
            )
        if self.optim.accumulate > 1 and self.objective.name not in ("supervised", "supmim"):
            raise ConfigError(
                f"optim.accumulate must be 1 with objective {self.objective.name!r}: its loss is "
                f"no mean over examples, and would not be that of the whole batch."
            )
        if self.tokens.cache and not self.has_tokens:
            raise ConfigError(
                f"tokens.cache is {self.tokens.cache!r}, but the objective predicts no tokens. "
                f"Leave it empty, or choose objective.target 'patch_codes' or 'vqgan'."
            )
        if "segmentation" in self.eval.which and not self.data.masks.field:
            raise ConfigError(
                "eval.which has 'segmentation', but data.masks.field is empty: name the data set's "
                "feature that holds the masks, or leave segmentation out."
            )
        if "miou" in self.eval.which and not self.needs_masks:
            raise ConfigError(
                f"eval.which has 'miou', but objective {self.objective.name!r} trains no head that "
                f"names pixels: take 'segmentation', which fits one, or leave it out."
            )
        if self.needs_masks and not self.data.masks.field:
            raise ConfigError(
                "data.masks.field is empty, but objective 'segmentation' learns from masks: name "
                "the data set's feature that holds them."
            )
        if self.needs_masks and self.data.augment == "rand_augment":
            raise ConfigError(
                "data.augment is 'rand_augment', which moves pixels away from their masks: take "
                "'three_augment' or 'none' with objective 'segmentation'."
            )

    @property
    def has_tokens(self) -> bool:
        """Whether image tokens are the target."""
        return self.objective.name == "supmim" and self.objective.target.name != "pixels"

    @property
    def needs_masks(self) -> bool:
        """Whether the step learns from a class per pixel; it then needs no class per image."""
        return self.objective.name == "segmentation"

    @property
    def needs_target(self) -> bool:
        """Whether the step needs each image as it was before colour augmentation, too."""
        plain = self.data.augment == "none"
        return self.objective.name == "supmim" and not plain and not self.tokens.cache

    @property
    def num_views(self) -> int:
        """Different crops of an image that the run sees."""
        epochs = max(1, math.ceil(self.epochs))  # the last step may reach a little further
        return min(self.tokens.views or epochs, epochs)

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


@dataclass(frozen=True)
class ProbeConfig:
    """What to measure trained encoders by. The encoder itself is that of its own run's config."""

    data: ProbeDataConfig = ProbeDataConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if self.eval.every:
            raise ConfigError(f"eval.every is {self.eval.every}; only training evaluates again.")
