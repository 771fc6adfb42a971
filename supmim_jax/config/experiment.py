"""A whole experiment: rules that its sections must satisfy together, and its debug version."""

import math
from dataclasses import dataclass, replace
from typing import Any

from supmim_jax.config.data import DataConfig, MasksConfig
from supmim_jax.config.evaluation import EvalConfig
from supmim_jax.config.fields import INF, LARGEST, within
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
from supmim_jax.config.training import (
    CheckpointConfig,
    InitConfig,
    LogConfig,
    MeshConfig,
    OptimConfig,
    WatchConfig,
)
from supmim_jax.errors import ConfigError


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


def changed(config: Any, **fields: Any) -> Any:
    """`config` with these fields; of a section a dict names the fields that change, and so on."""
    return replace(
        config,
        **{
            name: changed(getattr(config, name), **value) if isinstance(value, dict) else value
            for name, value in fields.items()
        },
    )


def debug(config: Config) -> Config:
    """A small version of the job on built-in images: for one GPU, or minutes on a CPU.

    `:debug` behind the name of a config file asks for it.

    Keeps the recipe (objective, mask, losses, augmentation, optimizer, dtype); shrinks the model
    to two layers of width 192 and the schedule to 20 steps of 32 images. What needs a file is left
    out: a VQGAN target becomes patch codes, a perceptual term is dropped, and what would start from
    a checkpoint starts anew.
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
    if config.objective.plain_target:
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
        init=InitConfig(),
        optim={"warmup_epochs": 0.25},
        batch_size=32,
        epochs=1,
        eval={"batch_size": 32, "every": 0},
        log={"every": 5},
    )
