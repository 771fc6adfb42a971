"""Checkpoints: plain nested dicts of arrays, beside them the config and the data position.

`saving` writes them, `sums` lists the SHA-256 of their files as they are committed, `damage`
compares them before anything is read, `restoring` reads, `places` finds them, `keeping` says which
stay, `room` asks the disk first.
"""

from supmim_jax.checkpoint.damage import verify
from supmim_jax.checkpoint.places import locate, split_step, steps
from supmim_jax.checkpoint.restoring import (
    BEGIN,
    check_params,
    plain,
    read_config,
    read_run,
    restore_params,
    stored_tree,
)
from supmim_jax.checkpoint.saving import Checkpoints

__all__ = [
    "BEGIN",
    "Checkpoints",
    "check_params",
    "locate",
    "plain",
    "read_config",
    "read_run",
    "restore_params",
    "split_step",
    "steps",
    "stored_tree",
    "verify",
]
