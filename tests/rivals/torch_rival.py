"""PyTorch's train step in another process, so that the two never share threads or memory."""

import os
from importlib.util import find_spec

import numpy as np
from jax.sharding import Mesh

from rivals.companion import Companion
from supmim_jax.bench import OURS, Turn
from supmim_jax.config import Config
from supmim_jax.errors import SetupError
from supmim_jax.models.masking import num_masked


def shapes(cfg: Config, device: str, compiles: bool) -> dict:
    """All that the rival is told of a run: sizes and numbers that JSON can hold.

    Raises:
      SetupError: PyTorch is missing, or the run does what the rival has no code for.
    """
    model, optim, data = cfg.model, cfg.optim, cfg.data
    if cfg.objective.name not in ("supervised", "supmim"):
        raise SetupError(
            f"--rival is for the objectives supervised and supmim, not {cfg.objective.name!r}."
        )
    mixing = cfg.objective.classification
    refused = {
        "config.objective.classification.cutmix": (mixing.cutmix, 0),
        "config.optim.name": (optim.name, "adamw"),
        "config.optim.layer_decay": (optim.layer_decay, 1),
        "config.optim.accumulate": (optim.accumulate, 1),
    }
    if cfg.objective.name == "supmim":
        refused["config.tokens.cache"] = (bool(cfg.tokens.cache), True)
    for field, (found, expected) in refused.items():
        if found != expected:
            raise SetupError(
                f"{field} is {found!r}; PyTorch's step is written for {expected!r}. Override it, "
                f"or leave --rival out."
            )
    if find_spec("torch") is None:
        raise SetupError(
            "--rival compares with PyTorch, which is not installed: pip install -e '.[parity]'"
        )
    mim = None
    if cfg.objective.name == "supmim":
        patches, decoder = (data.image_size // model.patch) ** 2, cfg.objective.decoder
        mim = {
            "visible": cfg.objective.encoder_input == "visible",
            "masked": num_masked(patches, cfg.objective.mask_ratio),
            "codes": cfg.objective.target.codes,
            "weight": cfg.objective.mim_weight,
            "decoder": {x: vars(decoder)[x] for x in ("width", "depth", "mlp_dim", "heads")},
        }
    return {
        "device": device, "threads": len(os.sched_getaffinity(0)), "compile": compiles,
        "batch": cfg.batch_size, "image_size": data.image_size, "channels": data.channels,
        "classes": data.num_classes, "patch": model.patch, "width": model.width,
        "depth": model.depth, "mlp_dim": model.mlp_dim, "heads": model.heads, "gelu": model.gelu,
        "cls": model.pooling == "cls", "learned_positions": model.positions == "learned",
        "layer_scale": model.layer_scale, "drop_path": model.drop_path,
        "bfloat16": model.dtype == "bfloat16", "loss": mixing.loss,
        "smoothing": mixing.label_smoothing, "mixup": mixing.mixup, "lr": cfg.peak_lr,
        "b1": optim.b1, "b2": optim.b2, "weight_decay": optim.weight_decay, "clip": optim.clip,
        "mim": mim,
    }  # fmt: skip


def device(mesh: Mesh) -> str:
    """PyTorch's name of the device that both run on.

    Raises:
      SetupError: it has none, or ours would run on several.
    """
    platform = mesh.devices.flat[0].platform
    if platform == "gpu" and mesh.size > 1:
        raise SetupError(
            f"--rival runs on one GPU, ours on {mesh.size}: set CUDA_VISIBLE_DEVICES=0."
        )
    if platform not in ("cpu", "gpu"):
        raise SetupError(f"--rival has no {platform}: leave it out, or set JAX_PLATFORMS=cpu.")
    return {"cpu": "cpu", "gpu": "cuda"}[platform]


class Rival(Companion):
    """The process of PyTorch; `about` is what it says of itself."""

    def __init__(self, sizes: dict, parameters: dict[str, int]):
        """Starts it and waits until it is warm.

        Args:
          sizes: as from `shapes`.
          parameters: of our model, by its parts: the rival must have as many.

        Raises:
          RuntimeError: it ended, or its model is another one.
        """
        super().__init__("torch_reference", "PyTorch", {"OMP_NUM_THREADS": str(sizes["threads"])})
        self.about = self.asked(sizes)
        if self.about["parameters"] != parameters:
            self.__exit__()
            raise RuntimeError(
                f"PyTorch's model has {self.about['parameters']} parameters, ours {parameters}: "
                f"they are not the same, and their speeds say nothing."
            )

    def run(self, how: str, steps: int) -> Turn:
        """Of `steps` one after the other; how: of about["ways"]."""
        return Turn(*self.asked([how, steps]))


def compared(turns: dict[str, list[Turn]]) -> dict:
    """PyTorch's times each way, and their ratio to ours by round, median, least and most: above 1
    ours is the faster."""
    ours, found = np.array(turns[OURS]), {}
    for how, theirs in turns.items():
        if how != OURS:
            wall, cpu = np.median(theirs, axis=0).tolist()
            x = np.array(theirs) / ours
            spread = np.stack([np.median(x, axis=0), x.min(0), x.max(0)], axis=1).tolist()
            found[how] = {
                "median_s": wall,
                "cpu_s": cpu,
                "ratio": spread[0],
                "cpu_ratio": spread[1],
            }
    return found


def table(result: dict) -> list[str]:
    """Ours beside PyTorch's."""
    found, batch, ours = result["rival"], result["batch_size"], result["step"]
    lines = [
        "| by turns | images/s | step, ms | CPU ms | time / ours (rounds) | CPU time / ours |",
        "|---|---|---|---|---|---|",
        f"| supmim_jax | {ours['images_per_s']:.1f} | {1e3 * ours['median_s']:.1f} | "
        f"{1e3 * ours['cpu_s']:.1f} | 1 | 1 |",
    ]
    for how, row in found["times"].items():
        ratios = ["{:.2f} ({:.2f} to {:.2f})".format(*row[x]) for x in ("ratio", "cpu_ratio")]
        lines.append(
            f"| PyTorch {found['version']}, {how} | {batch / row['median_s']:.1f} | "
            f"{1e3 * row['median_s']:.1f} | {1e3 * row['cpu_s']:.1f} | {' | '.join(ratios)} |"
        )
    least = min(row["ratio"][0] for row in found["times"].values())
    told = f"Above 1 ours is faster: {least:.2f} times PyTorch's best. {found['threads']} threads "
    told += f"each; PyTorch compiled and warmed up in {found['compile_s']:.0f} s."
    if found["not_compiled"]:
        told += f" Without torch.compile: {found['not_compiled']}"
    return [*lines, "", told]
