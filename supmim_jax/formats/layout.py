"""Our nested parameters as the flat, named arrays of another library's file, and back.

A format is a table with one row for each of our arrays. What a library cannot express (fixed
positions, LayerScale, another scale of pixels) is rewritten first, so that the function stays the
same.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from supmim_jax.config import DataConfig, ViTConfig
from supmim_jax.errors import SetupError, first_few
from supmim_jax.models.transformer import sincos2d

BLOCKS = "encoder/transformer/blocks"
CLS, REGISTERS, POSITIONS = "encoder/cls", "encoder/registers", "encoder/positions"


class Row(NamedTuple):
    """Where one of our arrays is in a file.

    `names` hold equal parts of our last axis, in order; "{}" in a name is the layer of a stacked
    array. A part becomes theirs by a reshape to `shape` and then a transpose by `axes`; empty
    ones leave it as it is.
    """

    ours: str
    names: tuple[str, ...]
    shape: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()

    @property
    def stacked(self) -> bool:
        return "{}" in self.names[0]


class Foreign(NamedTuple):
    """A model in another library's files, in our terms: `positions` are always learned here.

    The model sees pixels in [0, 1] less `mean` and divided by `std`, which have a number per
    channel or one for all.
    """

    model: ViTConfig
    num_classes: int  # 0: there is no classifier
    image_size: int
    channels: int
    eval_resize: int
    rows: tuple[Row, ...]
    prefix: int = 0  # of their positions, 1x(prefix+L)xD: these are of the CLS token and registers
    leaves_out: tuple[str, ...] = ()  # how names of arrays begin that are no part of the encoder
    class_names: tuple[str, ...] = ()
    resize: str = ""  # "": the file's filter is none of ours
    mean: tuple[float, ...] = (0.5,)  # this encoder's: it sees pixels / 127.5 - 1
    std: tuple[float, ...] = (0.5,)


def linear(ours: str, *names: str) -> tuple[Row, Row]:
    """A linear layer, or equal parts of one, that PyTorch keeps as `weight` and `bias`."""
    return (
        Row(f"{ours}/kernel", tuple(f"{name}.weight" for name in names), axes=(1, 0)),
        Row(f"{ours}/bias", tuple(f"{name}.bias" for name in names)),
    )


def norm(ours: str, name: str) -> tuple[Row, Row]:
    """A LayerNorm that PyTorch keeps as `weight` and `bias`."""
    return Row(f"{ours}/scale", (f"{name}.weight",)), Row(f"{ours}/bias", (f"{name}.bias",))


def convolution(name: str, model: ViTConfig, channels: int) -> tuple[Row, Row]:
    """Our patch embedding as PyTorch's convolution: width, channel, row, column."""
    shape = (model.patch, model.patch, channels, model.width)
    return (
        Row("encoder/patches/kernel", (f"{name}.weight",), shape, axes=(3, 2, 0, 1)),
        Row("encoder/patches/bias", (f"{name}.bias",)),
    )


def to_foreign(params: Any, rows: Iterable[Row], prefix: int = 0) -> dict[str, np.ndarray]:
    """The arrays of a file by name, with `prefix` zeros before the positions.

    Raises:
      ValueError: the rows do not name every parameter exactly once.
    """
    ours = traverse_util.flatten_dict(params, sep="/")
    if sorted(ours) != sorted(row.ours for row in rows):
        raise ValueError(f"rows {[row.ours for row in rows]}, parameters {list(ours)}")
    theirs = {}
    for row in rows:
        array = ours[row.ours]
        if row.ours == POSITIONS:  # our CLS token and registers have none: theirs are zeros
            array = np.pad(array, ((prefix, 0), (0, 0)))
        for i, layer in enumerate(array if row.stacked else [array]):
            for name, part in zip(row.names, np.split(layer, len(row.names), axis=-1)):
                part = part.reshape(row.shape) if row.shape else part
                theirs[name.format(i)] = part.transpose(row.axes) if row.axes else part
    return theirs


def from_foreign(theirs: dict[str, np.ndarray], found: Foreign, like: Any, file: str) -> dict:
    """Our parameters, shaped as the abstract `like`.

    Raises:
      SetupError: names or shapes in the file are not those of the model; the message names them.
    """
    shapes = {k: x.shape for k, x in traverse_util.flatten_dict(like, sep="/").items()}
    zeros = traverse_util.unflatten_dict({k: np.zeros(x) for k, x in shapes.items()}, sep="/")
    wanted = to_foreign(zeros, found.rows, found.prefix)
    problems = []
    for name in wanted | theirs:
        if name not in theirs:
            problems.append(f"{name} is missing, expected {list(wanted[name].shape)}")
        elif name not in wanted:
            problems.append(f"{name} {list(theirs[name].shape)} is not expected")
        elif (shape := theirs[name].shape) != wanted[name].shape:
            problems.append(f"{name} is {list(shape)}, expected {list(wanted[name].shape)}")
    if problems:
        raise SetupError(
            f"{file} does not hold the weights of the ViT that it describes: "
            f"{first_few(problems)}. Nothing was imported; is --from right, and the file whole?"
        )
    ours, extra = {}, np.zeros((0, 1), np.float32)
    for row in found.rows:
        shape = shapes[row.ours]
        depth, one = (shape[0], shape[1:]) if row.stacked else (1, shape)
        layers = []
        for i in range(depth):
            parts = [theirs[name.format(i)] for name in row.names]
            if row.ours == POSITIONS:
                extra, parts = parts[0][0, : found.prefix], [parts[0][:, found.prefix :]]
            if row.axes:
                parts = [x.transpose(np.argsort(row.axes)) for x in parts]
            layers.append(np.concatenate([x.reshape(*one[:-1], -1) for x in parts], axis=-1))
        ours[row.ours] = np.stack(layers) if row.stacked else layers[0]
    if CLS in ours and len(extra):
        ours[CLS], extra = ours[CLS] + extra[0], extra[1:]
    if REGISTERS in ours and len(extra):
        ours[REGISTERS] = ours[REGISTERS] + extra
    return traverse_util.unflatten_dict(ours, sep="/")


# --- what the names and shapes of a file's arrays say of its model


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern's group takes among the names."""
    found = [re.fullmatch(pattern, name) for name in names]
    return max((int(match[1]) + 1 for match in found if match), default=0)


def shapes(arrays: dict[str, Any], file: str) -> Callable[[str, int], tuple[int, ...]]:
    """Looks up the shape of an array that must be there with so many dimensions."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = arrays[name].shape if name in arrays else ()
        if len(found) != dimensions:
            is_there = list(found) if name in arrays else "missing"
            raise SetupError(f"{file}: {name} is {is_there}, expected {dimensions} dimensions.")
        return found

    return shape


def grid(rows: int, before: int, file: str, name: str) -> tuple[int, int]:
    """The side of a square grid of patches, from the number of its positions.

    They are of the patches alone, or also of the `before` tokens before these; the second value is
    how many such rows there are.
    """
    prefix = 0 if math.isqrt(rows) ** 2 == rows else before
    side = math.isqrt(max(rows - prefix, 0))
    if not side or side**2 != rows - prefix:
        raise SetupError(
            f"{file}: {name} has {rows - prefix} patch positions, expected a square number."
        )
    return side, prefix


# --- the same function with other parameters


def fixed_positions(model: ViTConfig, data: DataConfig) -> np.ndarray:
    side = data.image_size // model.patch
    return sincos2d(side, side, model.width, model.position_grid)


def with_positions(params: Any, model: ViTConfig, data: DataConfig) -> Any:
    """Fixed positions written out as an array, as if learned; learned ones stay as they are."""
    if model.positions == "learned":
        return params
    return params | {"encoder": params["encoder"] | {"positions": fixed_positions(model, data)}}


def without_fixed_positions(params: Any, model: ViTConfig, data: DataConfig) -> Any:
    """Inverse of `with_positions`: leaves them out if they are, bit for bit, the fixed ones."""
    encoder = dict(params["encoder"])
    if model.width % 4 == 0 and np.array_equal(encoder["positions"], fixed_positions(model, data)):
        del encoder["positions"]
    return params | {"encoder": encoder}


def with_our_pixels(params: Any, found: Foreign) -> Any:
    """The patch embedding of pixels u = 2p - 1 from that of (p - mean) / std, p in [0, 1].

    (p - m) / s = u / (2 s) + (0.5 - m) / s: the factor goes into the kernel, the rest into the
    bias. Nothing changes, to the bit, where mean and std are 0.5.
    """
    mean, std = np.array(found.mean, np.float32), np.array(found.std, np.float32)
    kernel, bias = (params["encoder"]["patches"][name] for name in ("kernel", "bias"))
    patch = found.model.patch
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
