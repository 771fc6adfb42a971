"""Our nested parameters as the flat, named arrays of another library's file, and back.

A format is a table of rows, one for each of our arrays. What a library cannot express is rewritten
first, so that the function stays the same: fixed positions, LayerScale, another scale of pixels.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from supmim_jax.config import DataConfig, ViTConfig
from supmim_jax.errors import SetupError, first_few
from supmim_jax.models.transformer import sincos2d

BLOCKS = "encoder/transformer/blocks"


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


class Layout(NamedTuple):
    """All of a file's arrays: a row for each of ours.

    `prefixed` names positions, 1x(prefix+L)xD, whose first rows belong to the CLS token and the
    registers. Ours have no positions: theirs are added to them. "" if there are none.
    """

    rows: tuple[Row, ...]
    prefixed: str = ""
    prefix: int = 1


def linear(ours: str, *names: str) -> tuple[Row, Row]:
    """A linear layer, or equal parts of one, that PyTorch keeps as `weight` and `bias`."""
    return (
        Row(f"{ours}/kernel", tuple(f"{name}.weight" for name in names), axes=(1, 0)),
        Row(f"{ours}/bias", tuple(f"{name}.bias" for name in names)),
    )


def norm(ours: str, name: str) -> tuple[Row, Row]:
    """A LayerNorm that PyTorch keeps as `weight` and `bias`."""
    return Row(f"{ours}/scale", (f"{name}.weight",)), Row(f"{ours}/bias", (f"{name}.bias",))


def convolution(name: str, patch: int, channels: int, width: int) -> tuple[Row, Row]:
    """Our patch embedding as PyTorch's convolution: width, channel, row, column."""
    return (
        Row(
            "encoder/patches/kernel",
            (f"{name}.weight",),
            shape=(patch, patch, channels, width),
            axes=(3, 2, 0, 1),
        ),
        Row("encoder/patches/bias", (f"{name}.bias",)),
    )


def to_foreign(params: Any, layout: Layout) -> dict[str, Any]:
    """The arrays of a file by name; works on abstract values under jax.eval_shape too.

    Raises:
      ValueError: the layout does not name every parameter exactly once.
    """
    ours = traverse_util.flatten_dict(params, sep="/")
    if sorted(ours) != sorted(row.ours for row in layout.rows):
        raise ValueError(f"layout {[row.ours for row in layout.rows]}, parameters {list(ours)}")
    theirs = {}
    for row in layout.rows:
        array = ours[row.ours]
        for i, layer in enumerate(array if _stacked(row) else [array]):
            size = layer.shape[-1] // len(row.names)
            for j, name in enumerate(row.names):
                part = layer[..., j * size : (j + 1) * size]
                part = part.reshape(row.shape) if row.shape else part
                theirs[name.format(i)] = part.transpose(row.axes) if row.axes else part
    if layout.prefixed:
        positions = theirs[layout.prefixed]
        theirs[layout.prefixed] = jnp.pad(positions, ((0, 0), (layout.prefix, 0), (0, 0)))
    return theirs


def from_foreign(theirs: dict[str, np.ndarray], layout: Layout, like: Any, file: str) -> Any:
    """Our parameters, shaped as the abstract `like`.

    Raises:
      SetupError: names or shapes in the file are not those of the model; the message names them.
    """
    check(theirs, jax.eval_shape(lambda params: to_foreign(params, layout), like), file)
    shapes = {k: x.shape for k, x in traverse_util.flatten_dict(like, sep="/").items()}
    extra = np.zeros((0, 1), np.float32)
    if layout.prefixed:
        positions = theirs[layout.prefixed]
        theirs = theirs | {layout.prefixed: positions[:, layout.prefix :]}
        extra = positions[0, : layout.prefix]
    ours = {}
    for row in layout.rows:
        shape = shapes[row.ours]
        depth, one = (shape[0], shape[1:]) if _stacked(row) else (1, shape)
        layers = [
            np.concatenate([_part(theirs[n.format(i)], row, one) for n in row.names], axis=-1)
            for i in range(depth)
        ]
        ours[row.ours] = np.stack(layers) if _stacked(row) else layers[0]
    if "encoder/cls" in ours and len(extra):
        ours["encoder/cls"], extra = ours["encoder/cls"] + extra[0], extra[1:]
    if "encoder/registers" in ours and len(extra):
        ours["encoder/registers"] = ours["encoder/registers"] + extra
    return traverse_util.unflatten_dict(ours, sep="/")


def check(found: dict[str, np.ndarray], wanted: dict[str, Any], file: str) -> None:
    """Raises SetupError unless the file holds exactly the wanted names and shapes."""
    problems = [
        f"{name} is missing, expected {list(x.shape)}"
        for name, x in wanted.items()
        if name not in found
    ]
    problems += [
        f"{name} {list(x.shape)} is not expected" for name, x in found.items() if name not in wanted
    ]
    problems += [
        f"{name} is {list(found[name].shape)}, expected {list(x.shape)}"
        for name, x in wanted.items()
        if name in found and found[name].shape != x.shape
    ]
    if problems:
        raise SetupError(
            f"{file} does not hold the weights of the ViT that it describes: "
            f"{first_few(problems)}. Nothing was imported; is --from right, and the file whole?"
        )


def count(names: Any, pattern: str) -> int:
    """One more than the largest number that the pattern's group takes among the names."""
    found = [re.fullmatch(pattern, name) for name in names]
    return max((int(match[1]) + 1 for match in found if match), default=0)


def shapes(arrays: dict[str, Any], file: str) -> Callable[[str, int], tuple[int, ...]]:
    """Looks up the shape of an array that must be there with so many dimensions."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = list(arrays[name].shape) if name in arrays else "missing"
        if name not in arrays or len(found) != dimensions:
            raise SetupError(f"{file}: {name} is {found}, expected {dimensions} dimensions.")
        return tuple(found)

    return shape


def _stacked(row: Row) -> bool:
    return "{}" in row.names[0]


def _part(array: np.ndarray, row: Row, shape: tuple[int, ...]) -> np.ndarray:
    """Their array as a part of ours, which is one layer of `shape`."""
    array = array.transpose(np.argsort(row.axes)) if row.axes else array
    return array.reshape(*shape[:-1], shape[-1] // len(row.names))


class Foreign(NamedTuple):
    """A model in another library's files, in our terms: `positions` are always learned here.

    num_classes is 0 where there is no classifier. Arrays whose names begin with one of `leaves_out`
    are no part of the encoder. The model sees pixels in [0, 1] less `mean` and divided by `std`,
    which have a number per channel or one for all. `resize` is "" where the file's filter is none
    of ours.
    """

    model: ViTConfig
    num_classes: int
    image_size: int
    channels: int
    eval_resize: int
    layout: Layout
    leaves_out: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    resize: str = ""
    mean: tuple[float, ...] = (0.5,)  # this encoder's: it sees pixels / 127.5 - 1
    std: tuple[float, ...] = (0.5,)


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
