"""Where arrays live: one mesh, and one table from parameter paths to mesh axes.

`data` replicates parameters, `fsdp` shards them and the batch, `tensor` splits layers. With several
slices only `data` crosses from one to another. Each device holds whole examples; `by_rows`, which
the models call, keeps their activations with them.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supmim_jax.config import Config, MeshConfig
from supmim_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the mesh axes that share the batch
BATCH = PartitionSpec(ROWS)
REPLICATED = PartitionSpec()


def by_rows(x_BxN) -> jax.Array:
    """`x` with its leading axis split over the devices that share the batch.

    The partitioner, left to itself, may keep the weights' FSDP sharding on what they produce, and
    then every device of that axis repeats the attention of all of its examples. Gradients are
    split alike. Outside a program that was traced for a mesh, as `TrainStep.build` does,
    `x` as is.
    """
    return _constrained(x_BxN, PartitionSpec(ROWS))


def rows_of_parts(x_PxBxN) -> jax.Array:
    """As `by_rows`, of arrays whose second axis counts examples."""
    return _constrained(x_PxBxN, PartitionSpec(None, ROWS))


def everywhere(x_BxN) -> jax.Array:
    """`x` whole on every device that shares the batch, to compare all examples with."""
    return _constrained(x_BxN, PartitionSpec())


def _constrained(x, spec: PartitionSpec) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)


# Searched in a parameter's path, first match wins. The leading None of a block's parameters is
# the axis of stacked layers. The optimizer's moments carry their parameter's path, and so its row.
RULES: tuple[tuple[str, tuple], ...] = (
    (r"blocks/(qkv|fc1)/kernel$", (None, "fsdp", "tensor")),
    (r"blocks/(out|fc2)/kernel$", (None, "tensor", "fsdp")),
    (r"blocks/(qkv|fc1)/bias$", (None, "tensor")),
    (r"(^|/)patches/kernel$", (None, "fsdp")),
    (r"(^|/)(embed|head|hidden|output|locator)/kernel$", ("fsdp", None)),
    # Convolutions (height, width, in, out): out, or in where out are the channels of an image.
    (r"(blocks/\d+/\w+|conv_in|upsample/\d+|layers/\d+)/kernel$", (None, None, None, "fsdp")),
    (r"segmenter/conv\d/kernel$", (None, None, None, "fsdp")),
    (r"(^|/)(conv_out|logit)/kernel$", (None, None, "fsdp", None)),
    (r"(^|/)codebook$", ("fsdp", None)),
    (r"/(bias|scale|scale1|scale2)$", ()),
    (r"(^|/)(positions|cls|registers|mask_token|mask_embedding|place_embedding|usage|steps)$", ()),
)


def path_name(path: tuple) -> str:
    """A pytree path as `encoder/transformer/blocks/qkv/kernel`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def make_mesh(cfg: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of `cfg` over `devices` (default: all of this run's).

    Raises:
      ConfigError: the axes do not multiply to the number of devices, or slices do not fit them.
    """
    devices = jax.devices() if devices is None else devices
    rest = cfg.fsdp * cfg.tensor
    data = cfg.data or max(len(devices) // rest, 1)
    if data * rest != len(devices):
        raise ConfigError(
            f"config.mesh is data={cfg.data}, fsdp={cfg.fsdp}, tensor={cfg.tensor}, but there are "
            f"{len(devices)} devices. The axes must multiply to that; data=0 takes what is left."
        )
    groups = by_slice(devices, cfg.slices)
    if data % len(groups):
        raise ConfigError(
            f"config.mesh.slices is {cfg.slices}, which does not divide data = {data}: whole rows "
            f"of the mesh must lie in one slice. Lower fsdp or tensor."
        )
    shape = (data // len(groups), cfg.fsdp, cfg.tensor)
    # Neighbours on a mesh axis are close; an axis may take a part of a dimension of the TPU slice.
    arranged = [
        mesh_utils.create_device_mesh(shape, group, allow_split_physical_axes=True)
        for group in groups
    ]
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return Mesh(np.concatenate(arranged), AXES, axis_types=types)


def run_mesh(cfg: Config, devices: list | None = None) -> Mesh:
    """The mesh of a run of `cfg`; each step's batch divides evenly over its devices.

    Raises:
      ConfigError: as `make_mesh`, or it does not, also in config.optim.accumulate micro-batches.
    """
    mesh = make_mesh(cfg.mesh, devices)
    check_batch(cfg.batch_size, mesh, "config.batch_size", cfg.optim.accumulate)
    return mesh


def by_slice(devices: list, slices: int) -> list[list]:
    """The devices of each slice, in the order of the slices' numbers.

    Raises:
      ConfigError: they are of another number of slices, or these of different sizes.
    """
    number = [getattr(d, "slice_index", 0) for d in devices]
    if slices == 1 and devices[0].platform != "tpu":  # elsewhere it may number hosts
        return [devices]
    groups = [[d for d, i in zip(devices, number) if i == n] for n in sorted(set(number))]
    sizes = [len(group) for group in groups]
    if len(groups) != slices or len(set(sizes)) != 1:
        raise ConfigError(
            f"config.mesh.slices is {slices}, but the {len(devices)} devices are of "
            f"{len(groups)} slices with {', '.join(map(str, sizes))} of them. Set it to their "
            f"number; slices must be of one size."
        )
    return groups


def check_batch(batch_size: int, mesh: Mesh, field: str, parts: int = 1) -> None:
    """Checks that the global batch, also in `parts` micro-batches, divides over the devices.

    Raises:
      ConfigError: it does not.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    step = shards * parts
    if batch_size % step:
        below = batch_size - batch_size % step
        micro = f" in {parts} micro-batches (config.optim.accumulate)" if parts > 1 else ""
        raise ConfigError(
            f"{field} is {batch_size}, which the {shards} batch shards of the mesh "
            f"{dict(mesh.shape)} don't divide{micro}. Take {below or step} or {below + step}, or "
            f"another config.mesh."
        )
    if parts > 1 and batch_size // parts % 2:
        raise ConfigError(
            f"config.optim.accumulate is {parts}, which leaves micro-batches of "
            f"{batch_size // parts} examples; mixing pairs them, so it must be even."
        )


def image_batch(cfg: Config, batch_size: int, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A global batch of the run's images, uint8 BxHxWxC, its rows split over the mesh.

    Raises:
      ConfigError: the mesh does not divide it.
    """
    check_batch(batch_size, mesh, "config.eval.batch_size")
    shape = (batch_size, cfg.data.image_size, cfg.data.image_size, cfg.data.channels)
    return jax.ShapeDtypeStruct(shape, np.uint8, sharding=NamedSharding(mesh, BATCH))


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The layout of the array at `path`.

    Raises:
      ConfigError: no rule names the path, or a mesh axis does not divide the array.
    """
    if not shape:
        return REPLICATED
    axes = next((axes for pattern, axes in RULES if re.search(pattern, path)), None)
    if axes is None:
        raise ConfigError(f"No rule of sharding.RULES names the parameter {path} {shape}; add one.")
    for size, axis in zip(shape, axes, strict=False):
        if axis and size % mesh.shape[axis]:
            raise ConfigError(
                f"config.mesh.{axis} is {mesh.shape[axis]}, which does not divide the {size} of "
                f"{path} {shape}. Choose a divisor, or another width."
            )
    return PartitionSpec(*axes)


def shard_like_params(tree: Any, mesh: Mesh) -> Any:
    """`tree` of abstract values (parameters, optimizer or train state) with shardings attached."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec(path_name(path), x.shape, mesh))
        ),
        tree,
    )


def replicated(tree: Any, mesh: Mesh) -> Any:
    """`tree` of abstract values, each whole on every device."""
    sharding = NamedSharding(mesh, REPLICATED)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def put(tree: Any, abstract: Any) -> Any:
    """Host arrays, the same on every process, as global arrays laid out like `abstract`."""

    def place(x, like):
        x = np.asarray(x, like.dtype)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: x[index])

    return jax.tree.map(place, tree, abstract)
