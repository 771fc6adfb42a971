"""Where activations live on a mesh, for the models: each device holds whole examples."""

import jax
from jax.sharding import PartitionSpec

ROWS = ("data", "fsdp")  # the mesh axes that share the batch


def by_rows(x_BxN) -> jax.Array:
    """`x` with its leading axis split over the devices that share the batch.

    The partitioner, left to itself, may keep the weights' FSDP sharding on what they produce, and
    then every device of that axis repeats the attention of all of its examples. Gradients are
    split alike. Outside a program that was traced for a mesh (`program.build` does so), `x` as is.
    """
    return _constrained(x_BxN, PartitionSpec(ROWS))


def rows_of_parts(x_PxBxN) -> jax.Array:
    """As `by_rows`, of arrays whose second axis counts examples."""
    return _constrained(x_PxBxN, PartitionSpec(None, ROWS))


def everywhere(x_BxN) -> jax.Array:
    """`x` whole on every device that shares the batch: what all examples are compared with."""
    return _constrained(x_BxN, PartitionSpec())


def _constrained(x, spec: PartitionSpec) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)
