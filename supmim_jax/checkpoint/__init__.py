"""Checkpoints: plain nested dicts of arrays, beside them the config and the data position.

`saving` writes them, `sums` lists the SHA-256 of their files as they are committed, `damage`
compares them before anything is read, `restoring` reads, `places` finds them, `keeping` says which
stay, `room` asks the disk first.
"""

from supmim_jax.checkpoint.checksums import verify
from supmim_jax.checkpoint.restore import (
    BEGIN,
    check_params,
    locate,
    plain,
    read_config,
    read_run,
    restore_params,
    split_step,
    steps,
    stored_tree,
)
from supmim_jax.checkpoint.save import Checkpoints

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
