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


def without_layer_scale(params: Any) -> Any:
    """LayerScale multiplied into the layer before it: (x W + b) s = x (W s) + b s."""
    blocks = dict(params["encoder"]["transformer"]["blocks"])
    for layer, scale in (("out", "scale1"), ("fc2", "scale2")):
        if scale in blocks:
            scale = blocks.pop(scale)
            kernel, bias = blocks[layer]["kernel"], blocks[layer]["bias"]
            blocks[layer] = {"kernel": kernel * scale[:, None, :], "bias": bias * scale}
    return params | {"encoder": params["encoder"] | {"transformer": {"blocks": blocks}}}
