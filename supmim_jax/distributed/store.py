"""The key-value store of JAX's coordination service, which process 0 of a run keeps.

It has no public API; this module is the one place that uses it.
"""

import jax
from jax._src import distributed as coordination

from supmim_jax.config import SetupError

PATIENCE = 300  # seconds for what another process, which is there, is about to say
MOST = 5  # differences shown for a process, and processes shown
ROOT = "supmim_jax"  # of all keys

hosts: dict[int, str] = {}  # by process, once all have joined


def active() -> bool:
    """Whether this process has joined others."""
    return coordination.global_state.client is not None


def state():
    """What JAX knows of this process's place among others."""
    return coordination.global_state


def me() -> int:
    """The number of this process."""
    return coordination.global_state.process_id


def client():
    """The store, as this process reaches it; None before it has joined."""
    return coordination.global_state.client


def name(process: int) -> str:
    """A process as a person finds it."""
    host = hosts.get(process)
    return f"process {process}" + (f" on {host}" if host else "")


def heard(key: str, process: int, patience: float = PATIENCE) -> str:
    """The value of `key`, which `process` sets.

    Raises:
      SetupError: it does not.
    """
    try:
        return client().blocking_key_value_get(key, int(1000 * patience))
    except jax.errors.JaxRuntimeError:
        raise SetupError(
            f"{name(process)} has joined, but said nothing for {patience:.0f} s. Its own output "
            f"may say why."
        ) from None


def few(texts: list[str]) -> list[str]:
    """The first of them, and how many more there are."""
    rest = len(texts) - MOST
    return texts[:MOST] + ([f"and {rest} more"] if rest > 0 else [])
