"""FLOPs of the real train step: by arithmetic on the config, and counted in its compiled program.

Nothing is allocated and no data are read, so a laptop can compile a full-size step. The arithmetic
is per image. A multiply-add counts 2. A matmul of the forward pass costs twice as much in the
backward pass, one matmul for the gradient of each factor. The patch embedding costs only once as
much there, because pixels need no gradient, and the tokenizer nothing, because it is frozen.
Without mixup and CutMix both branches of the `masked` form embed the same patches; XLA then does so
once, while this counts it twice.
"""

import json
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
from absl import flags

from supmim_jax import cli, sharding
from supmim_jax.config import Config, DecoderConfig, ViTConfig
from supmim_jax.config.configdict import from_configdict
from supmim_jax.errors import SetupError
from supmim_jax.models.masking import num_masked
from supmim_jax.rehearse import aot, hlo
from supmim_jax.train_step import TrainStep


class Work(NamedTuple):
    """FLOPs per image; `recomputed` is what rematerialization repeats of the forward pass."""

    forward: int
    backward: int
    recomputed: int = 0

    @property
    def model(self) -> int:
        """What the gradient needs, whatever is stored: the FLOPs of a utilization (MFU)."""
        return self.forward + self.backward


def check(cfg: Config) -> None:
    """Raises SetupError where there is no arithmetic to compare counts with."""
    if not train(cfg):
        raise SetupError(
            f"--config is of objective {cfg.objective.name!r}, which leaves a "
            f"{cfg.objective.leaves}; FLOPs are counted for encoders and classifiers only."
        )


def total(cfg: Config) -> Work:
    """All of a train step."""
    return Work(*map(sum, zip(Work(0, 0), *train(cfg).values())))


def train(cfg: Config) -> dict[str, Work]:
    """The parts of a train step; {} for objectives without arithmetic."""
    model, objective = cfg.model, cfg.objective
    patches = (cfg.data.image_size // model.patch) ** 2
    pixels = model.patch**2 * cfg.data.channels
    if objective.leaves not in ("classifier", "encoder"):
        return {}
    if objective.leaves == "encoder":
        return _without_labels(cfg, patches, pixels)
    segments, embedded = [patches + model.prefix], patches
    parts = {"head": _trained(2 * model.width * cfg.data.num_classes)}
    if objective.masks_patches:
        visible = objective.encoder_input == "visible"
        entering = patches - num_masked(patches, objective.mask_ratio) if visible else patches
        segments.append(entering + model.prefix)
        embedded += entering
        outputs = objective.target.codes if cfg.has_tokens else pixels
        parts["decoder"] = _decoder(cfg, patches, entering, outputs)
        if cfg.has_tokens and not cfg.tokens.cache:
            parts["tokenizer"] = Work(tokenizer(cfg, patches), 0)
    embedding = 2 * embedded * pixels * model.width
    return parts | {
        "encoder": _stack(model, segments, model.remat),
        "patch embedding": Work(embedding, embedding),
    }


def _without_labels(cfg: Config, patches: int, pixels: int) -> dict[str, Work]:
    """MAE and CMAE: every view's kept patches through the encoder, all through the decoder, and
    the masked ones out of it."""
    model, objective, views = cfg.model, cfg.objective, cfg.objective.crops
    kept = patches - num_masked(patches, objective.mask_ratio)
    encoder = _stack(model, [kept + model.prefix] * views, model.remat)
    embedding = 2 * views * kept * pixels * model.width
    decoder = _decoder(cfg, patches, kept, pixels)
    parts = {
        "decoder": Work(*(views * flops for flops in decoder)),
        "encoder": encoder,
        "patch embedding": Work(embedding, embedding),
    }
    if asked := objective.asked_places(kept):
        parts["head"] = _trained(2 * views * asked * model.width * patches)
    if sizes := objective.projector:
        projector = 2 * (model.width + sizes.dim) * sizes.hidden
        predictor = 4 * sizes.dim * sizes.hidden
        slow = encoder.forward + embedding + views * projector
        fast = _trained(views * (projector + predictor))
        logits = 2 * views * cfg.batch_size * sizes.dim  # of one image with the global batch
        # The slow encoder and the keys of the logits get no gradient.
        parts["contrastive"] = Work(slow + fast.forward + logits, fast.backward + logits)
    return parts


def _decoder(cfg: Config, patches: int, entering: int, outputs: int) -> Work:
    """The decoder of one view, of which `entering` patches come out of the encoder."""
    objective, decoder, prefix = cfg.objective, cfg.objective.decoder, cfg.model.prefix
    ends = 2 * (entering + prefix) * cfg.model.width * decoder.width
    drawn = objective.mask_ratio_std > 0
    leaving = patches if drawn else num_masked(patches, objective.mask_ratio)
    ends += 2 * leaving * decoder.width * outputs
    blocks = _stack(decoder, [patches + prefix], cfg.model.remat)
    return Work(blocks.forward + ends, blocks.backward + 2 * ends, blocks.recomputed)


def _trained(forward: int) -> Work:
    return Work(forward, 2 * forward)


def tokenizer(cfg: Config, patches: int) -> int:
    """FLOPs of an image's tokens, with those of enlarging it where a token is larger."""
    target, channels = cfg.objective.target, cfg.data.channels
    if target.name == "patch_codes":
        grey = target.normalize == "luminance"
        to_grey = 2 * channels * cfg.data.image_size**2 if grey and channels == 3 else 0
        values = cfg.model.patch**2 * (1 if grey else channels)
        return 2 * patches * values * target.codes + to_grey
    side = math.isqrt(patches) * target.downsampling
    flops, before = _conv3(side, channels, target.filters), target.filters
    if side != cfg.data.image_size:
        flops += 2 * side * cfg.data.image_size * (cfg.data.image_size + side) * channels
    for level, multiplier in enumerate(target.multipliers):
        size, width = side >> level, target.filters * multiplier
        for _ in range(target.res_blocks):
            flops += _conv3(size, before, width) + _conv3(size, width, width)
            flops += 2 * size**2 * width**2 * (before != width)
            before = width
    flops += 2 * target.res_blocks * _conv3(size, width, width)
    flops += 2 * size**2 * width * target.code_dim
    return flops + 2 * patches * target.code_dim * target.codes


def _conv3(side: int, inputs: int, outputs: int) -> int:
    """A 3x3 convolution; at the border the part of the kernel outside costs nothing."""
    return 2 * (3 * side - 2) ** 2 * inputs * outputs


def _stack(cfg: ViTConfig | DecoderConfig, segments: list[int], remat: str) -> Work:
    """`depth` blocks over packed segments of tokens; attention stays within a segment.

    Recomputed is what `transformer.REMAT_POLICIES` doesn't save and the backward pass reads:
    attention's logits. Of a single block it is an upper bound: XLA then sees that the two
    computations are one.
    """
    tokens = sum(segments)
    logits = sum(2 * n * n * cfg.width for n in segments)
    qkv, out = 2 * tokens * 3 * cfg.width**2, 2 * tokens * cfg.width**2
    mlp = 2 * tokens * cfg.width * cfg.mlp_dim  # fc1, and fc2
    recomputed = {"none": 0, "names": logits, "full": qkv + 2 * logits + out + mlp}
    forward = cfg.depth * (qkv + 2 * logits + out + 2 * mlp)
    return Work(forward, 2 * forward, cfg.depth * recomputed[remat])


GIGA = 1e9


def measure(cfg: Config, mesh: jax.sharding.Mesh) -> dict:
    """Compiles the train step of `cfg` and counts."""
    prog = TrainStep.build(cfg, mesh)
    start = time.perf_counter()
    compiled = prog.step.lower(prog.state, prog.batch, prog.frozen).compile()
    seconds = time.perf_counter() - start
    return counted(cfg, mesh, compiled) | {"compile_seconds": seconds}


def counted(cfg: Config, mesh: jax.sharding.Mesh, compiled) -> dict:
    """FLOPs of the whole step on all devices, beside the arithmetic, and bytes of one device.

    Bytes are what the compiler allots to arguments, results and temporary values (its own
    `peak_memory` leaves the last out on CPU). CPU keeps float32 copies of what other devices hold
    in bfloat16.

    Raises:
      UnknownCost: the program does work that its text doesn't tell the amount of.
    """
    found = hlo.parse(compiled.as_text()).flops * mesh.size
    work, memory = total(cfg), aot.memory(compiled)
    model, recomputed = cfg.batch_size * work.model, cfg.batch_size * work.recomputed
    return {
        "objective": cfg.objective.name,
        "batch_size": cfg.batch_size,
        "remat": cfg.model.remat,
        "devices": f"{mesh.size} {mesh.devices.flat[0].device_kind}",
        "hlo_flops_per_step": found,
        "hlo_gf_per_image": found / cfg.batch_size / GIGA,
        "analytic_gf_per_image": work.model / GIGA,
        "recomputed_gf_per_image": work.recomputed / GIGA,
        "ratio": found / model,
        "ratio_with_recomputed": found / (model + recomputed),
        "parts": {name: part._asdict() for name, part in train(cfg).items()},
        "bytes_per_device": sum(memory.values()) - memory["code"],
    }


def report(result: dict) -> str:
    """The result as a table for people."""
    lines = [f"{'GF per image':28}{'forward':>10}{'backward':>10}{'recomputed':>12}"]
    for name, part in result["parts"].items():
        forward, backward, recomputed = (flops / GIGA for flops in part.values())
        lines.append(f"{name:28}{forward:10.3f}{backward:10.3f}{recomputed:12.3f}")
    model, recomputed = result["analytic_gf_per_image"], result["recomputed_gf_per_image"]
    lines += [
        f"{'all by arithmetic':28}{model:10.3f}, with what is recomputed {model + recomputed:.3f}",
        f"{'all in the program':28}{result['hlo_gf_per_image']:10.3f}, {result['ratio']:.4f} of "
        f"the first, {result['ratio_with_recomputed']:.4f} of the second",
        f"{result['objective']}, batch {result['batch_size']}, remat {result['remat']}, "
        f"{result['devices']}: {result['hlo_flops_per_step'] / 1e12:.1f} TF per step; memory "
        f"{result['bytes_per_device'] / 2**30:.2f} GiB per device; compiled in "
        f"{result['compile_seconds']:.0f} s",
    ]
    return "\n".join(lines)


def command() -> Callable[[], None]:
    """Defines the flags of this bench; what it returns prints a table and the result as JSON."""
    config = cli.define("Experiment: configs/<name>.py")
    flags.mark_flag_as_required("config")

    def run() -> None:
        cfg = from_configdict(config.value)
        check(cfg)
        result = measure(cfg, sharding.run_mesh(cfg))
        print(report(result))
        print(json.dumps(result))

    return run
