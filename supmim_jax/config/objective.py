"""The training methods, one section each, selected by `name`.

Whatever the rest of the code must know about a method, it reads from the section, as attributes of
`Objective`. No other file mentions a method by name.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from supmim_jax.config.fields import INF, path_field, within
from supmim_jax.config.model import DecoderConfig, PatchCodesConfig, PixelsConfig, VQGANConfig
from supmim_jax.errors import ConfigError


class Objective:
    """What an objective says of itself; sections override what is not so for them.

    An attribute here may be a field or a property there.
    """

    leaves: ClassVar[str]  # at inference: "classifier", "encoder", "segmenter" or "tokenizer"
    crops: ClassVar[int] = 1  # of an image that one step sees: the length of `Batch.views`
    is_mean: ClassVar[bool] = True  # a mean over examples: micro-batches add up to the batch
    masks_patches: ClassVar[bool] = False  # part of the patches is hidden
    mask_ratio_std: ClassVar[float] = 0.0  # of the share that is hidden, which steps may draw
    # The target: the tokenizer whose ids are predicted; whether it is of the image before colour
    # augmentation; whether it is each patch's pixels, divided by their own deviation.
    token_target: ClassVar[PatchCodesConfig | VQGANConfig | None] = None
    plain_target: ClassVar[bool] = False
    normalizes_patches: ClassVar[bool] = False
    frozen_encoder: ClassVar[str] = ""  # the checkpoint whose frozen encoder the loss uses
    # The sizes of the projector and predictor that compare views; None without them.
    projector: ClassVar["ContrastiveConfig | None"] = None
    terms: ClassVar[tuple[str, ...]] = ("loss", "accuracy")  # of the metrics, for the terminal

    def asked_places(self, kept: int) -> int:
        """Of this many visible patches, the number that the encoder is asked to place."""
        return 0

    def tokenizer_for(self, patch: int) -> "tuple[PatchCodesConfig | VQGANConfig, int]":
        """The section of the tokenizer that is trained or predicted, and the size of a token."""
        return self.token_target, patch


@dataclass(frozen=True)
class ClassificationConfig:
    # sigmoid: binary cross-entropy of soft targets, summed over classes (AugReg); bce: every label
    # that is mixed in is 1; bce_mean: the same as a mean over classes, as DeiT-III has it.
    loss: Literal["softmax", "sigmoid", "bce", "bce_mean"] = "softmax"
    label_smoothing: float = within(0.0, 0.0, 0.99)
    mixup: float = within(0.0, 0.0, INF)  # Beta parameter; 0 switches it off
    # Mixup's share x of the image itself is max(x, 1 - x), as in big_vision's code. Partners are
    # mirrors in the batch, so this only swaps them: each mixture goes to the image that it has more
    # of, whose masked twin and id it then goes with.
    mixup_larger: bool = False
    cutmix: float = within(0.0, 0.0, INF)  # Beta parameter; with mixup on, a coin per batch

    def __post_init__(self):
        if self.loss in ("bce", "bce_mean") and self.label_smoothing:
            raise ConfigError(
                f"label_smoothing must be 0 with loss = {self.loss!r}: its targets are 0 or 1."
            )


@dataclass(frozen=True)
class SupervisedConfig(Objective):
    leaves: ClassVar[str] = "classifier"

    name: Literal["supervised"] = "supervised"
    classification: ClassificationConfig = ClassificationConfig()


@dataclass(frozen=True)
class SupMIMConfig(Objective):
    leaves: ClassVar[str] = "classifier"
    masks_patches: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("loss", "ce", "mim", "accuracy")

    name: Literal["supmim"] = "supmim"
    classification: ClassificationConfig = ClassificationConfig()
    mask_ratio: float = within(0.5, 0.01, 0.99)  # share of the patches that are masked
    # Above 0, each step draws its ratio, as MAGE does (arXiv 2211.09117): from a normal of this
    # deviation around mask_ratio, cut to [mask_ratio_min, 1]. All patches then go to the output.
    mask_ratio_std: float = within(0.0, 0.0, INF)
    mask_ratio_min: float = within(0.5, 0.01, 0.99)
    mask_form: Literal["random", "block"] = "random"
    encoder_input: Literal["masked", "visible"] = "masked"  # mask embeddings, or kept patches only
    mim_weight: float = within(1.0, 0.0, INF)
    decoder: DecoderConfig = DecoderConfig()
    target: PatchCodesConfig | VQGANConfig | PixelsConfig = PatchCodesConfig()
    token_smoothing: float = within(0.0, 0.0, 0.99)  # label smoothing of the masked tokens' loss
    plain_target: ClassVar[bool] = True

    def __post_init__(self):
        if self.mask_ratio_std and self.encoder_input != "masked":
            raise ConfigError(
                f"mask_ratio_std is {self.mask_ratio_std} with encoder_input = "
                f"{self.encoder_input!r}, whose shapes are those of one ratio: set it to 0, or "
                f"encoder_input to 'masked'."
            )
        if self.mask_ratio_std and self.mask_ratio < self.mask_ratio_min:
            raise ConfigError(
                f"mask_ratio is {self.mask_ratio}, below mask_ratio_min = {self.mask_ratio_min}: "
                f"the mean of the ratios that are drawn must be at least the least."
            )
        if self.token_smoothing and self.normalizes_patches:
            raise ConfigError(
                f"token_smoothing is {self.token_smoothing}, but the target is pixels: set it to "
                f"0, or choose a target of tokens."
            )

    @property
    def token_target(self) -> PatchCodesConfig | VQGANConfig | None:
        return None if self.normalizes_patches else self.target

    @property
    def normalizes_patches(self) -> bool:
        return isinstance(self.target, PixelsConfig)


@dataclass(frozen=True)
class MAEConfig(Objective):
    """Masked autoencoder (arXiv 2111.06377); its encoder sees the kept patches only."""

    leaves: ClassVar[str] = "encoder"
    masks_patches: ClassVar[bool] = True

    name: Literal["mae"] = "mae"
    mask_ratio: float = within(0.75, 0.01, 0.99)  # share of the patches that are masked; paper
    normalize_patches: bool = True  # the target's, by their own mean and deviation
    decoder: DecoderConfig = DecoderConfig()

    @property
    def normalizes_patches(self) -> bool:
        return self.normalize_patches


@dataclass(frozen=True)
class ContrastiveConfig:
    """The two views of an image find each other in the batch; the other is a momentum branch's."""

    weight: float = within(0.1, 0.0, INF)  # 0 leaves out the task, the second view and the branch
    temperature: float = within(1.0, 1e-3, INF)
    momentum: float = within(0.999, 0.0, 1.0)
    hidden: int = within(256, 1, 2**16)  # of projector and predictor
    dim: int = within(64, 1, 2**16)  # in which views are compared


@dataclass(frozen=True)
class PositionConfig:
    """The place of each token is predicted from the encoder's output."""

    weight: float = within(1.0, 0.0, INF)  # 0 leaves the task out
    # True: a share of the visible patches enters without its place, and only theirs is asked for.
    # False: all enter with their places, which the encoder can then pass on; all are asked for.
    leak_free: bool = True
    unplaced: float = within(0.75, 0.01, 1.0)  # that share, with leak_free


@dataclass(frozen=True)
class CMAEConfig(MAEConfig):
    """MAE with a smaller decoder and two more tasks of the encoder (arXiv 2205.10546)."""

    is_mean: ClassVar[bool] = False
    terms: ClassVar[tuple[str, ...]] = ("loss", "reconstruction", "position", "contrastive")

    name: Literal["cmae"] = "cmae"
    decoder: DecoderConfig = DecoderConfig(depth=1, width=16, mlp_dim=64, heads=2)
    contrastive: ContrastiveConfig = ContrastiveConfig()
    position: PositionConfig = PositionConfig()

    @property
    def crops(self) -> int:
        return 2 if self.contrastive.weight else 1

    @property
    def projector(self) -> ContrastiveConfig | None:
        return self.contrastive if self.contrastive.weight else None

    def asked_places(self, kept: int) -> int:
        if not self.position.weight:
            return 0
        return max(round(self.position.unplaced * kept), 1) if self.position.leak_free else kept


@dataclass(frozen=True)
class SegmentationObjectiveConfig(Objective):
    leaves: ClassVar[str] = "segmenter"
    is_mean: ClassVar[bool] = False

    name: Literal["segmentation"] = "segmentation"
    head: Literal["linear", "conv"] = "conv"


@dataclass(frozen=True)
class PerceptualConfig:
    """Distance of a trained encoder's normalised patch tokens; 0 leaves the encoder out."""

    weight: float = within(0.0, 0.0, INF)
    checkpoint: str = path_field()  # workdir[@step] of a run with this config's model section


@dataclass(frozen=True)
class AdversarialConfig:
    """A patch discriminator with the non-saturating loss; weight 0 leaves it out."""

    weight: float = within(0.0, 0.0, INF)
    r1_weight: float = within(10.0, 0.0, INF)  # gradient penalty on real images (1801.04406)
    start: float = within(0.25, 0.0, 1.0)  # share of the run after which it acts on the tokenizer
    filters: int = within(64, 1, 2**12)
    layers: int = within(3, 1, 8)  # that halve the resolution


@dataclass(frozen=True)
class VQGANObjectiveConfig(Objective):
    leaves: ClassVar[str] = "tokenizer"
    is_mean: ClassVar[bool] = False
    terms: ClassVar[tuple[str, ...]] = ("loss", "psnr", "code_usage")

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

    @property
    def frozen_encoder(self) -> str:
        return self.perceptual.checkpoint if self.perceptual.weight else ""

    def tokenizer_for(self, patch: int) -> tuple[VQGANConfig, int]:
        return self.tokenizer, self.tokenizer.downsampling
