"""Several processes as one run: how they find each other, agree, and fail together."""

from supmim_jax.distributed.join import Place, join, place
from supmim_jax.distributed.store import active
from supmim_jax.distributed.together import agree, barrier, gather
from supmim_jax.distributed.watch import (
    EXIT_TRY_AGAIN,
    behind,
    end,
    leave,
    on_preemption,
    reached,
)

__all__ = [
    "EXIT_TRY_AGAIN",
    "Place",
    "active",
    "agree",
    "barrier",
    "behind",
    "end",
    "gather",
    "join",
    "leave",
    "on_preemption",
    "place",
    "reached",
]
