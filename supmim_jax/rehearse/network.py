"""How long a collective keeps the links between chips busy."""

import numpy as np

from supmim_jax.hlo.collectives import Collective
from supmim_jax.rehearse.chips import Slice

# Times that all-gather's traffic passes a chip: all-reduce is a reduce-scatter and an all-gather.
PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


def seconds(collective: Collective, coordinates: np.ndarray, part: Slice) -> float:
    """Least time of one execution, if nothing else uses the links and latency is nothing.

    Rings along every dimension that the group spans run at once, each in both directions where
    the dimension is a closed ring that belongs to the group. What is not a ring (all-to-all,
    permutations) takes the average number of hops over as many links.

    Args:
      collective: groups count devices as in `coordinates`.
      coordinates: of each device of the mesh in the slice, (devices, dimensions).
      part: the slice.
    """
    members = coordinates[collective.groups[0]]
    spanned = [d for d in range(len(part.shape)) if len(set(members[:, d])) > 1]
    if collective.kind in PASSES:
        closed = [part.wraps[d] and len(set(members[:, d])) == part.shape[d] for d in spanned]
        bandwidth = part.chip.link * sum(2 if ring else 1 for ring in closed)
        share = (collective.group_size - 1) / collective.group_size
        return PASSES[collective.kind] * collective.bytes * share / bandwidth
    hops = mean_hops(collective, coordinates, part)
    links = 2 * sum(size > 1 for size in part.shape)
    return collective.bytes * hops / (links * part.chip.link)


def mean_hops(collective: Collective, coordinates: np.ndarray, part: Slice) -> float:
    """Average distance of what a device sends; to itself it is 0."""
    if collective.kind == "collective-permute":
        at, to = (coordinates[collective.groups[:, i]] for i in (0, 1))
    else:
        members = coordinates[collective.groups[0]]
        at, to = members[:, None], members[None, :]
    distance = np.abs(at - to)[..., : len(part.shape)]
    shape = np.array(part.shape)
    distance = np.where(part.wraps, np.minimum(distance, shape - distance), distance)
    return float(distance.sum(-1).mean())
