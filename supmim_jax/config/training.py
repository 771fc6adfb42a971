"""How a run is carried out: starting point, optimizer, devices, logging, checkpoints."""

from dataclasses import dataclass
from typing import Literal

from supmim_jax.config.fields import INF, SMALLEST, path_field, within
from supmim_jax.errors import ConfigError


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
