"""How a run is carried out: from what it starts, optimizer, devices, logging, checkpoints."""

from dataclasses import dataclass
from typing import Literal

from supmim_jax.config.fields import INF, ConfigError, within


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
    b1: float = within(0.9, 0.0, 0.999999)
    b2: float = within(0.999, 0.0, 0.999999)
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
