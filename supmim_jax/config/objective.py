"""The training methods, one section each, picked by `name`."""

from dataclasses import dataclass
from typing import Literal

from supmim_jax.config.fields import INF, ConfigError, within
from supmim_jax.config.model import DecoderConfig
from supmim_jax.config.tokenizer import PatchCodesConfig, PixelsConfig, VQGANConfig


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
class SupMIMConfig:
    name: Literal["supmim"] = "supmim"
    classification: ClassificationConfig = ClassificationConfig()
    mask_ratio: float = within(0.5, 0.01, 0.99)  # share of the patches that are masked
    mask_form: Literal["random", "block"] = "random"
    encoder_input: Literal["masked", "visible"] = "masked"  # mask embeddings, or kept patches only
    mim_weight: float = within(1.0, 0.0, INF)
    decoder: DecoderConfig = DecoderConfig()
    target: PatchCodesConfig | VQGANConfig | PixelsConfig = PatchCodesConfig()


@dataclass(frozen=True)
class SegmentationObjectiveConfig:
    name: Literal["segmentation"] = "segmentation"
    head: Literal["linear", "conv"] = "conv"


@dataclass(frozen=True)
class PerceptualConfig:
    """Distance of a trained encoder's normalised patch tokens; 0 leaves the encoder out."""

    weight: float = within(0.0, 0.0, INF)
    checkpoint: str = ""  # workdir[@step] of a run with this config's model section


@dataclass(frozen=True)
class AdversarialConfig:
    """A patch discriminator with the non-saturating loss; weight 0 leaves it out."""

    weight: float = within(0.0, 0.0, INF)
    r1_weight: float = within(10.0, 0.0, INF)  # gradient penalty on real images (1801.04406)
    start: float = within(0.25, 0.0, 1.0)  # share of the run after which it acts on the tokenizer
    filters: int = within(64, 1, INF)
    layers: int = within(3, 1, 8)  # that halve the resolution


@dataclass(frozen=True)
class VQGANObjectiveConfig:
    name: Literal["vqgan"] = "vqgan"
    tokenizer: VQGANConfig = VQGANConfig()
    l1_weight: float = within(0.0, 0.0, INF)
    l2_weight: float = within(1.0, 0.0, INF)
    codebook_weight: float = within(1.0, 0.0, INF)
    commitment_weight: float = within(0.25, 0.0, INF)
    entropy_weight: float = within(0.1, 0.0, INF)
    entropy_temperature: float = within(0.01, 1e-6, INF)
    usage_decay: float = within(0.99, 0.0, 1.0)  # per step, of the running share of each code
    # A code whose share falls below this part of 1 / codes is moved onto an encoder output.
    revive_below: float = within(0.03, 0.0, 1.0)
    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig = AdversarialConfig()

    def __post_init__(self):
        if self.perceptual.weight and not self.perceptual.checkpoint:
            raise ConfigError(
                "perceptual.weight is set, but perceptual.checkpoint names no encoder: give the "
                "--workdir of a training run, or set perceptual.weight to 0."
            )
        if self.tokenizer.path:
            raise ConfigError("tokenizer.path must be empty: this run trains the tokenizer.")
