"""Several processes as one run: how they find each other, agree, and fail together."""

from supmim_jax.distributed.join import Place, join, place
from supmim_jax.distributed.together import (
    EXIT_TRY_AGAIN,
    active,
    agree,
    barrier,
    end,
    leave,
    told_to_stop,
)

__all__ = [
    "EXIT_TRY_AGAIN",
    "Place",
    "active",
    "agree",
    "barrier",
    "end",
    "join",
    "leave",
    "place",
    "told_to_stop",
]
