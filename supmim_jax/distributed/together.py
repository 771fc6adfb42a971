"""How the processes of one run agree.

What must be the same everywhere is compared before the first collective: one that only some
processes reach hangs.
"""

import json

from supmim_jax.config import SetupError
from supmim_jax.configdict import differences
from supmim_jax.distributed import store


def agree(topic: str, here: dict[str, dict]) -> None:
    """Returns if `here`, sections of plain values, is the same on all processes.

    Raises:
      SetupError: on every process, naming those that differ from process 0, their hosts, and what.
    """
    if not store.active():
        return
    me, key, values = store.me(), f"{store.ROOT}/agree/{topic}", store.client()
    here = json.loads(json.dumps(here))
    if me == 0:
        values.key_value_set(f"{key}/wanted", json.dumps(here))
    wanted = json.loads(store.heard(f"{key}/wanted", 0))
    found = [x for name in here for x in differences(wanted[name], here[name], name)]
    values.key_value_set(f"{key}/{me}", "; ".join(store.few(found)))
    if me == 0:
        said = {i: store.heard(f"{key}/{i}", i) for i in store.hosts}
        odd = [f"{store.name(i)}: {text}" for i, text in said.items() if text]
        values.key_value_set(f"{key}/verdict", "\n  ".join(store.few(odd)))
    if verdict := store.heard(f"{key}/verdict", 0):
        raise SetupError(
            f"The processes of this run have different {topic} ({store.name(0)}; the one named):\n"
            f"  {verdict}\nStart all of them with the same."
        )


def barrier(name: str) -> None:
    """Waits for all processes, which must come at about the same time."""
    if store.active():
        store.client().wait_at_barrier(f"{store.ROOT}/{name}", 1000 * store.PATIENCE)


def gather(topic: str, here: str, patience: float = store.PATIENCE) -> list[str]:
    """What each process says about `topic`, a name used once; all must call it."""
    key = f"{store.ROOT}/gather/{topic}"
    store.client().key_value_set(f"{key}/{store.me()}", here)
    count = store.state().num_processes
    return [store.heard(f"{key}/{i}", i, patience) for i in range(count)]
