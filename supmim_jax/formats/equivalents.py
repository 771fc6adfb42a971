"""Parameters rewritten so that another library can express them; the function stays the same."""

from typing import Any

import numpy as np

from supmim_jax.config import DataConfig, ViTConfig
from supmim_jax.models.transformer import sincos2d


def with_positions(params: Any, model: ViTConfig, data: DataConfig) -> Any:
    """Fixed positions written out as an array, as if learned; learned ones stay as they are."""
    if model.positions == "learned":
        return params
    return params | {"encoder": params["encoder"] | {"positions": fixed(model, data)}}


def without_fixed_positions(params: Any, model: ViTConfig, data: DataConfig) -> Any:
    """Inverse of `with_positions`: leaves them out if they are, bit for bit, the fixed ones."""
    encoder = dict(params["encoder"])
    if model.width % 4 == 0 and np.array_equal(encoder["positions"], fixed(model, data)):
        del encoder["positions"]
    return params | {"encoder": encoder}


def fixed(model: ViTConfig, data: DataConfig) -> np.ndarray:
    side = data.image_size // model.patch
    return sincos2d(side, side, model.width, model.position_grid)


def with_our_pixels(
    params: Any, mean: tuple[float, ...], std: tuple[float, ...], patch: int
) -> Any:
    """The patch embedding of pixels u = 2p - 1 from that of (p - mean) / std, p in [0, 1].

    (p - m) / s = u / (2 s) + (0.5 - m) / s: the factor goes into the kernel, the rest into the
    bias. Nothing changes, to the bit, where mean and std are 0.5.
    """
    mean, std = np.array(mean, np.float32), np.array(std, np.float32)
    kernel, bias = (params["encoder"]["patches"][name] for name in ("kernel", "bias"))
    by_channel = kernel.reshape(patch, patch, -1, kernel.shape[-1])  # row, column, channel, width
    shift = (by_channel * ((0.5 - mean) / std)[:, None]).sum((0, 1, 2))
    scaled = (by_channel / (2 * std)[:, None]).reshape(kernel.shape)
    patches = {"kernel": scaled, "bias": bias + shift}
    return params | {"encoder": params["encoder"] | {"patches": patches}}


def without_layer_scale(params: Any) -> Any:
    """LayerScale multiplied into the layer before it: (x W + b) s = x (W s) + b s."""
    blocks = dict(params["encoder"]["transformer"]["blocks"])
    for layer, scale in (("out", "scale1"), ("fc2", "scale2")):
        if scale in blocks:
            scale = blocks.pop(scale)
            kernel, bias = blocks[layer]["kernel"], blocks[layer]["bias"]
            blocks[layer] = {"kernel": kernel * scale[:, None, :], "bias": bias * scale}
    return params | {"encoder": params["encoder"] | {"transformer": {"blocks": blocks}}}
