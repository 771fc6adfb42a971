"""The matmul FLOPs of a train step by arithmetic on the config, per image; a multiply-add is 2.

A matmul of the forward pass costs its double in the backward pass: one matmul for the gradient of
each factor. The patch embedding costs itself, as pixels need no gradient, and the tokenizer
nothing, as it is frozen. Without mixup and CutMix both branches of SupMIM's `masked` form embed the
same patches; XLA then does so once, and this counts it twice.
"""

import math
from dataclasses import dataclass

from supmim_jax.config import Config, DecoderConfig, ViTConfig
from supmim_jax.models.masking import num_masked


@dataclass(frozen=True)
class Work:
    """FLOPs per image; `recomputed` is what rematerialization repeats of the forward pass."""

    forward: int
    backward: int
    recomputed: int = 0

    @property
    def model(self) -> int:
        """What the gradient needs, whatever is stored: the FLOPs of a utilization (MFU)."""
        return self.forward + self.backward


OBJECTIVES = ("supervised", "supmim", "mae", "cmae")


def train(cfg: Config) -> dict[str, Work]:
    """The parts of a train step; names as in `flops.PARTS`."""
    model, objective = cfg.model, cfg.objective
    patches = (cfg.data.image_size // model.patch) ** 2
    pixels = model.patch**2 * cfg.data.channels
    prefix = int(model.pooling == "cls")
    if objective.leaves == "encoder":
        return _without_labels(cfg, patches, pixels, prefix)
    segments, embedded = [patches + prefix], patches
    parts = {"head": _trained(2 * model.width * cfg.data.num_classes)}
    if objective.name == "supmim":
        visible = objective.encoder_input == "visible"
        entering = patches - num_masked(patches, objective.mask_ratio) if visible else patches
        segments.append(entering + prefix)
        embedded += entering
        parts["decoder"] = _decoder(cfg, patches, entering, prefix, outputs_per_patch(cfg))
        if cfg.has_tokens and not cfg.tokens.cache:
            parts["tokenizer"] = Work(tokenizer(cfg, patches), 0)
    parts["encoder"] = _stack(model, segments, model.remat)
    embedding = 2 * embedded * pixels * model.width
    parts["patch embedding"] = Work(embedding, embedding)
    return parts


def _without_labels(cfg: Config, patches: int, pixels: int, prefix: int) -> dict[str, Work]:
    """MAE and CMAE: every view's kept patches through the encoder, all through the decoder, and
    the masked ones out of it."""
    model, objective, views = cfg.model, cfg.objective, cfg.crops_per_example
    kept = patches - num_masked(patches, objective.mask_ratio)
    encoder = _stack(model, [kept + prefix] * views, model.remat)
    embedding = 2 * views * kept * pixels * model.width
    decoder = _decoder(cfg, patches, kept, prefix, pixels)
    parts = {
        "decoder": _times(decoder, views),
        "encoder": encoder,
        "patch embedding": Work(embedding, embedding),
    }
    if objective.name == "cmae" and objective.position.weight:
        asked = objective.position.asked(kept)
        parts["head"] = _trained(2 * views * asked * model.width * patches)
    if objective.name == "cmae" and objective.contrastive.weight:
        sizes = objective.contrastive
        projector = 2 * (model.width + sizes.dim) * sizes.hidden
        predictor = 4 * sizes.dim * sizes.hidden
        slow = Work(encoder.forward + embedding + views * projector, 0)
        fast = _trained(views * (projector + predictor))
        logits = 2 * views * cfg.batch_size * sizes.dim  # of one image with the global batch
        forward = slow.forward + fast.forward + logits
        parts["contrastive"] = Work(forward, fast.backward + logits)  # keys get no gradient
    return parts


def _decoder(cfg: Config, patches: int, entering: int, prefix: int, outputs: int) -> Work:
    """The decoder of one view, of which `entering` patches come out of the encoder."""
    decoder = cfg.objective.decoder
    ends = 2 * (entering + prefix) * cfg.model.width * decoder.width
    ends += 2 * num_masked(patches, cfg.objective.mask_ratio) * decoder.width * outputs
    whole = _stack(decoder, [patches + prefix], cfg.model.remat)
    return Work(whole.forward + ends, whole.backward + 2 * ends, whole.recomputed)


def _times(work: Work, count: int) -> Work:
    return Work(count * work.forward, count * work.backward, count * work.recomputed)


def outputs_per_patch(cfg: Config) -> int:
    """Of the decoder: logits of codes, or pixels."""
    if cfg.has_tokens:
        return cfg.objective.target.codes
    return cfg.model.patch**2 * cfg.data.channels


def tokenizer(cfg: Config, patches: int) -> int:
    """FLOPs of an image's tokens, with those of enlarging it where a token is larger."""
    target, channels = cfg.objective.target, cfg.data.channels
    if target.name == "patch_codes":
        grey = target.normalize == "luminance"
        to_grey = 2 * channels * cfg.data.image_size**2 if grey and channels == 3 else 0
        values = cfg.model.patch**2 * (1 if grey else channels)
        return 2 * patches * values * target.codes + to_grey
    side = math.isqrt(patches) * target.downsampling
    flops, before = 0, target.filters
    if side != cfg.data.image_size:
        flops += 2 * side * cfg.data.image_size * (cfg.data.image_size + side) * channels
    flops += _conv3(side, channels, target.filters)
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


def _trained(forward: int) -> Work:
    return Work(forward, 2 * forward)


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
    recomputed = {
        "none": 0,
        "names": logits,
        "full": qkv + 2 * logits + out + mlp,
    }
    forward = cfg.depth * (qkv + 2 * logits + out + 2 * mlp)
    return Work(forward, 2 * forward, cfg.depth * recomputed[remat])
