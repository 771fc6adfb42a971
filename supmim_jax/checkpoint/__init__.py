"""Checkpoints: plain nested dicts of arrays, with the config and the data position.

`save` writes them in the background, and decides which ones stay. `checksums` lists the SHA-256 of
their files in the same commit, and verifies them before anything is read. `restore` finds and reads
them.
"""

from supmim_jax.checkpoint.checksums import verify
from supmim_jax.checkpoint.restore import BEGIN, Checkpoint, locate, plain, split_step, steps
from supmim_jax.checkpoint.save import Checkpoints

__all__ = [
    "BEGIN",
    "Checkpoint",
    "Checkpoints",
    "locate",
    "plain",
    "split_step",
    "steps",
    "verify",
]
