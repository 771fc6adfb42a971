"""A whole experiment, with the sections of how it is carried out and judged.

The rules that all sections must satisfy together and the debug version are here, too.
"""

import math
import typing
from dataclasses import dataclass, replace
from typing import Any, Literal

from supmim_jax.config.data import DataConfig, MasksConfig, ProbeDataConfig
from supmim_jax.config.fields import INF, LARGEST, SMALLEST, path_field, within
from supmim_jax.config.model import DecoderConfig, PatchCodesConfig, TokensConfig, ViTConfig
from supmim_jax.config.objective import (
    CMAEConfig,
    MAEConfig,
    PerceptualConfig,
    SegmentationObjectiveConfig,
    SupervisedConfig,
    SupMIMConfig,
    VQGANObjectiveConfig,
)
from supmim_jax.errors import ConfigError

# --- how a run is carried out


@dataclass(frozen=True)
class InitConfig:
    """What the first step starts from; a run with a checkpoint of its own resumes from that."""

    checkpoint: str = path_field()  # workdir[@step] of a run whose encoder to take; "" draws one
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
    warmup_lr: float = within(0.0, 0.0, INF)  # that the warm-up begins with
    # per_epoch: timm's. The rate stands for an epoch, and the cosine is one over all epochs, whose
    # beginning the warm-up takes the place of. product: scenic's. The cosine is over all steps, and
    # the warm-up, from 0, is a factor of it.
    schedule: Literal["per_step", "per_epoch", "product"] = "per_step"
    weight_decay: float = within(0.05, 0.0, INF)  # decoupled, times the learning rate
    b1: float = within(0.9, 0.0, 0.999999)
    b2: float = within(0.999, 0.0, 0.999999)
    eps: float = within(1e-8, SMALLEST, 1.0)  # of Adam's denominator
    # What decays: matrices; with CLS, mask tokens and mask embeddings, as in MAE's code; or all, as
    # in scenic's, with biases, norms and positions.
    decay_on: Literal["matrices", "matrices_and_tokens", "all"] = "matrices"
    # Polyak's moving average of the parameters, new = ema * old + (1 - ema) * parameters; 0: none.
    # Where there is one, it is what evaluations, probes, exports and other runs take.
    ema: float = within(0.0, 0.0, 0.9999999)
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
    keep_every: int = within(0, 0, INF)  # steps; those of its multiples are kept too; 0: none
    keep_best: str = ""  # a metric of the evaluation; the checkpoint where it is best is kept too

    def __post_init__(self):
        if self.keep_every % self.every:
            below = self.keep_every - self.keep_every % self.every
            raise ConfigError(
                f"keep_every is {self.keep_every}, not a multiple of every = {self.every}, so "
                f"those steps are not saved; {below or self.every} or {below + self.every} would "
                f"do, and 0 keeps none of them."
            )


@dataclass(frozen=True)
class WatchConfig:
    """What ends a run that goes wrong, or lets it roll back."""

    stall_factor: float = within(50.0, 0.0, INF)  # no step in so many medians of a step's time: end
    stall_seconds: float = within(300.0, 0.0, INF)  # but never before; stall_factor 0: never
    # How often, in a run, NaN or infinity makes it go back to its newest checkpoint and leave out
    # the batches since then; 0: it ends.
    roll_backs: int = within(0, 0, INF)


# --- what encoders are judged by, in training (EvalConfig) and by `probe` (ProbeConfig)

# `top1` and `miou` ask the run's own heads; the others see frozen features.
Evaluation = Literal["top1", "miou", "knn", "retrieval", "linear", "few_shot", "segmentation"]


@dataclass(frozen=True)
class KNNConfig:
    """Votes of the nearest training images; more ks than are there to vote are left out."""

    ks: tuple[int, ...] = within((20,), 1, INF)  # if several, each is reported as `knn/k=<k>`
    report_k: int = within(20, 1, INF)  # reported as `knn`; at most the training images
    temperature: float = within(0.07, 1e-6, INF)  # a neighbour's vote is exp(cosine / temperature)


@dataclass(frozen=True)
class RetrievalConfig:
    """Each image of the evaluation split searches the others of it."""

    recalls: tuple[int, ...] = within((1, 10, 100), 1, INF)


@dataclass(frozen=True)
class LinearProbeConfig:
    """Logistic regression; its strength is chosen on a held-out part of the training split."""

    strengths: tuple[float, ...] = within(  # scikit-learn's C: a small one is a strong penalty
        (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0), 1e-12, 1e12
    )
    held_out: float = within(0.2, 0.01, 0.5)
    seed: int = within(0, 0, 2**31 - 1)


@dataclass(frozen=True)
class FewShotConfig:
    """Least squares on a few images of each class, as in big_vision; the mean over draws."""

    shots: int = within(10, 1, INF)
    draws: int = within(5, 1, INF)
    penalty: float = within(1024.0, 1e-12, INF)
    seed: int = within(0, 0, 2**31 - 1)


@dataclass(frozen=True)
class HeadTrainingConfig:
    """AdamW with decay on matrices only; warm-up over a tenth of the steps, cosine to zero."""

    steps: int = within(600, 1, INF)
    batch_size: int = within(32, 1, INF)
    learning_rate: float = within(3e-3, 0.0, INF)
    weight_decay: float = within(1e-4, 0.0, INF)
    seed: int = within(0, 0, 2**31 - 1)


@dataclass(frozen=True)
class SegmentationConfig:
    """Heads on frozen tokens, learning from the masks of the data section."""

    heads: tuple[Literal["linear", "conv"], ...] = ("linear", "conv")
    # First images of the training split that the heads learn from. Their tokens stay in the host's
    # memory as float16: 0.4 MB an image for ViT-B/14 at 224 pixels.
    max_examples: int = within(20_000, 1, INF)
    training: HeadTrainingConfig = HeadTrainingConfig()


@dataclass(frozen=True)
class EvalConfig:
    every: int = within(0, 0, INF)  # steps; 0 evaluates at the end only
    batch_size: int = within(256, 1, INF)
    which: tuple[Evaluation, ...] = ("top1", "knn")  # the others take a while: see configs/probes
    knn: KNNConfig = KNNConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    linear: LinearProbeConfig = LinearProbeConfig()
    few_shot: FewShotConfig = FewShotConfig()
    segmentation: SegmentationConfig = SegmentationConfig()

    @property
    def metrics(self) -> tuple[str, ...]:
        """What `which` may give, by name; more is better of each."""
        ks = sorted({*self.knn.ks, self.knn.report_k}) if len(self.knn.ks) > 1 else []
        names = {
            "top1": ["top1"],
            "miou": ["miou", "pixel_accuracy"],
            "knn": ["knn", *(f"knn/k={k}" for k in ks)],
            "retrieval": [*(f"recall@{k}" for k in self.retrieval.recalls), "map@r"],
            "linear": ["linear"],
            "few_shot": ["few_shot"],
            "segmentation": [
                f"{name}/{head}"
                for head in self.segmentation.heads
                for name in ("miou", "pixel_accuracy")
            ],
        }
        return tuple(name for evaluation in self.which for name in names[evaluation])


# --- a run, and a probe of others


@dataclass(frozen=True)
class Config:
    seed: int = within(0, 0, 2**31 - 1)
    batch_size: int = within(64, 1, INF)  # global
    epochs: float = within(1.0, 0.0, INF)
    data: DataConfig = DataConfig()
    model: ViTConfig = ViTConfig()
    objective: (
        SupervisedConfig
        | SupMIMConfig
        | MAEConfig
        | CMAEConfig
        | SegmentationObjectiveConfig
        | VQGANObjectiveConfig
    ) = SupMIMConfig()
    tokens: TokensConfig = TokensConfig()
    init: InitConfig = InitConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watch: WatchConfig = WatchConfig()

    def __post_init__(self):
        self._check_sizes()
        self._check_schedule()
        self._check_objective()
        self._check_masks()
        self._check_boxes()
        self._check_keeping()

    def _check_sizes(self) -> None:
        size, patch = self.data.image_size, self.model.patch
        if size % patch:
            below = size - size % patch
            raise ConfigError(
                f"data.image_size is {size}, not a multiple of model.patch = {patch}; "
                f"{below or patch} or {below + patch} would do."
            )
        if self.objective.masks_patches and size == patch:
            raise ConfigError(f"model.patch is {patch}, the whole image: nothing is left to mask.")
        if self.objective.normalizes_patches and patch**2 * self.data.channels == 1:
            raise ConfigError(
                "model.patch is 1 with data.channels = 1: a patch of one value has no deviation to "
                "be normalised by. Take larger patches."
            )
        _, side = self.objective.tokenizer_for(patch)
        if size % side:
            raise ConfigError(
                f"data.image_size is {size}, but objective.tokenizer makes tokens of {side} "
                f"pixels, with one halving between two of its multipliers; the size must be a "
                f"multiple of that."
            )

    def _check_schedule(self) -> None:
        if self.total_steps > LARGEST[int]:
            raise ConfigError(
                f"epochs is {self.epochs:g}: of data.train_examples = {self.data.train_examples} "
                f"in batches of {self.batch_size} these are {self.total_steps:.3g} steps, and "
                f"steps are counted to {LARGEST[int]}."
            )
        if self.num_views > LARGEST[int]:
            raise ConfigError(f"epochs is {self.epochs:g}; views are counted to {LARGEST[int]}.")
        if self.peak_lr > LARGEST[float]:
            raise ConfigError(
                f"optim.lr is {self.optim.lr:g} at optim.lr_batch = {self.optim.lr_batch}, which "
                f"is {self.peak_lr:g} at batch_size = {self.batch_size}: more than a float32 holds."
            )
        if self.optim.final_lr > self.peak_lr:
            raise ConfigError(
                f"optim.final_lr is {self.optim.final_lr:g}, above the peak of {self.peak_lr:g} "
                f"that the cosine comes from (optim.lr, at optim.lr_batch). Lower it, or raise lr."
            )

    def _check_objective(self) -> None:
        if self.objective.leaves == "tokenizer" and self.optim.layer_decay != 1.0:
            raise ConfigError(
                f"optim.layer_decay must be 1 with objective {self.objective.name!r}: it is for "
                f"the layers of an encoder that is trained, and there is none."
            )
        if self.optim.accumulate > 1 and not self.objective.is_mean:
            raise ConfigError(
                f"optim.accumulate must be 1 with objective {self.objective.name!r}: its loss is "
                f"no mean over examples, and would not be that of the whole batch."
            )
        if self.tokens.cache and not self.has_tokens:
            raise ConfigError(
                f"tokens.cache is {self.tokens.cache!r}, but the objective predicts no tokens. "
                f"Leave it empty, or choose objective.target 'patch_codes' or 'vqgan'."
            )

    def _check_masks(self) -> None:
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
        if self.needs_masks and self.data.moves_pixels:
            raise ConfigError(
                f"data.augment is {self.data.augment!r}, which moves pixels away from their masks: "
                "take 'three_augment' or 'none' with objective 'segmentation'."
            )

    def _check_boxes(self) -> None:
        if not self.data.learns_boxes:
            return
        if self.objective.leaves not in ("classifier", "encoder"):
            raise ConfigError(
                f"data.contrastive_crop.boxes is 'heat_map', which is for objectives that train an "
                f"encoder on images alone or with labels, not {self.objective.name!r}: take "
                f"'centre', or another data.crop."
            )
        if self.tokens.cache:
            raise ConfigError(
                f"data.contrastive_crop.boxes is 'heat_map', which moves the crops while the run "
                f"learns, but tokens.cache = {self.tokens.cache!r} holds the tokens of crops that "
                f"were drawn before: take 'centre', or leave tokens.cache empty."
            )

    def _check_keeping(self) -> None:
        best = self.checkpoint.keep_best
        if best and not self.eval.every:
            raise ConfigError(
                f"checkpoint.keep_best is {best!r}, but eval.every is 0, so that only the end is "
                f"evaluated: set eval.every to some steps, or leave keep_best empty."
            )
        if best and best not in self.metrics:
            raise ConfigError(
                f"checkpoint.keep_best is {best!r}; the evaluations of this run give "
                f"{', '.join(map(repr, self.metrics)) or 'nothing'}."
            )

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics of this run's evaluations; for each, higher is better."""
        if self.objective.leaves == "tokenizer":
            return ("psnr", "codes_used", "perplexity")
        classifies = self.objective.leaves == "classifier"
        return tuple(name for name in self.eval.metrics if name != "top1" or classifies)

    @property
    def has_tokens(self) -> bool:
        """Whether image tokens are the target."""
        return self.objective.token_target is not None

    @property
    def needs_masks(self) -> bool:
        """Whether the step learns from a class per pixel, and so needs no class per image."""
        return self.objective.leaves == "segmenter"

    @property
    def evaluates_masks(self) -> bool:
        """Whether an evaluation reads a class per pixel."""
        return bool({"segmentation", "miou"} & set(self.eval.which))

    @property
    def needs_target(self) -> bool:
        """Whether the step needs each image as it was before colour augmentation, too."""
        plain = self.data.augment == "none"
        return self.objective.plain_target and not plain and not self.tokens.cache

    @property
    def steps_per_boxes(self) -> int:
        """Steps between two passes that find the boxes to crop by; 0 if there are none."""
        if not self.data.learns_boxes:
            return 0
        every = self.data.contrastive_crop.every_epochs
        return max(1, round(every * self.data.train_examples / self.batch_size))

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`; one precedes anything that takes long."""
        due = step % self.checkpoint.every == 0
        return due or self.evaluates_after(step) or self.finds_boxes_after(step)

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation is due after `step`; the last step always has one."""
        return bool(self.eval.every) and 0 < step < self.total_steps and not step % self.eval.every

    def finds_boxes_after(self, step: int) -> bool:
        """Whether new boxes to crop by are due after `step`."""
        every = self.steps_per_boxes
        return bool(every) and 0 < step < self.total_steps and not step % every

    @property
    def num_views(self) -> int:
        """Different crops of an image that the run sees."""
        epochs = max(1, math.ceil(self.epochs))  # the last step may reach a little further
        views = epochs * self.data.repeats
        return min(self.tokens.views or views, views)

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


def changed(config: Any, **fields: Any) -> Any:
    """`config` with these fields; of a section a dict names the fields that change, and so on.

    Raises:
      ConfigError: a value is of another type than its field, or does not fit.
    """
    return _changed(config, fields, "")


def _changed(config: Any, fields: dict, path: str) -> Any:
    new, hints = {}, typing.get_type_hints(type(config))
    for name, value in fields.items():
        if isinstance(value, dict):
            value = _changed(getattr(config, name), value, f"{path}{name}.")
        kind = hints.get(name)
        number = kind is float and type(value) is int
        # Now: what is computed from the values would raise errors that name no field.
        if kind in (bool, int, float, str) and type(value) is not kind and not number:
            raise ConfigError(
                f"{path}{name} is {value!r} of type {type(value).__name__}; it must be "
                f"{kind.__name__}."
            )
        new[name] = value
    return replace(config, **new)


def debug(config: Config) -> Config:
    """A small version of the job on built-in images: for one GPU, or minutes on a CPU.

    `:debug` behind the name of a config file asks for it.

    Keeps the recipe (objective, mask, losses, augmentation, optimizer, dtype); shrinks the model
    to two layers of width 192 and the schedule to 20 steps of 32 images. What needs a file is left
    out: a VQGAN target becomes patch codes, tokens come from no cache, a perceptual term is
    dropped, and what would start from a checkpoint starts anew. It runs on any number of devices
    that divides the batch, and evaluates at the end only.
    """
    data = {
        "name": "fractals/small",
        "train_split": "train[:640]",
        "eval_split": "validation[:100]",
        "train_examples": 640,
        "num_classes": 50,
        "label_field": "label",
        "masks": MasksConfig(field="segmentation", num_classes=51),
        "workers": 0,
        "threads": 2,
    }
    objective = {}
    if config.objective.masks_patches:
        objective["decoder"] = DecoderConfig(depth=1, width=96, mlp_dim=384, heads=3)
    if config.has_tokens:
        objective["target"] = PatchCodesConfig(codes=64, normalize="luminance", fit_images=64)
    if config.objective.leaves == "tokenizer":
        size = min(config.data.image_size, 4 * config.objective.tokenizer.downsampling)
        data |= {"image_size": size, "eval_resize": size}
        objective |= {"tokenizer": {"filters": 32}, "perceptual": PerceptualConfig()}
    return changed(
        config,
        model={"width": 192, "depth": 2, "mlp_dim": 768, "heads": 3},
        data=data,
        objective=objective,
        tokens={"cache": ""},
        init=InitConfig(),
        optim={"warmup_epochs": 0.25},
        batch_size=32,
        epochs=1,
        eval={
            "batch_size": 32,
            "every": 0,
            "segmentation": {"max_examples": 100, "training": {"steps": 20}},
        },
        checkpoint={"keep_best": ""},  # which needs an evaluation on the way
        mesh=MeshConfig(),
        log={"every": 5},
    )
