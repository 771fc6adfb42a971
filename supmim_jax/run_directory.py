"""A run's directory: what it must hold before a run begins or goes on, and who else sees it."""

import json
import socket
import time

import jax
from etils import epath
from jax.sharding import Mesh

from supmim_jax import distributed, environment, frozen
from supmim_jax.config import Config, SetupError
from supmim_jax.configdict import differences, from_configdict, to_configdict
from supmim_jax.metrics import write_json

# Where a run goes on, how it reads, logs and saves may change between its parts.
MAY_CHANGE = (
    "config.mesh.",
    "config.log.",
    "config.eval.",
    "config.checkpoint.",
    "config.tokens.cache:",  # the same tokens elsewhere, or made in the step: frozen.check_kept
    "config.objective.target.path:",
    "config.data.data_dir:",
    "config.data.workers:",
    "config.data.threads:",
    "config.data.prefetch:",
    "config.data.max_broken:",
)
SHARED_WITHIN = 20  # seconds after which every host must see a file that another one wrote
MASKS = ("config.data.masks.",)  # may change where only an evaluation reads them


def check(workdir: epath.Path, cfg: Config) -> None:
    """Raises SetupError if the workdir holds a run that this config would not continue."""
    path = workdir / "config.json"
    try:
        found = json.loads(path.read_text()) if path.exists() else None
    except (OSError, json.JSONDecodeError) as error:
        raise SetupError(f"{path} cannot be read: {error}. Choose another --workdir.") from None
    if found is None:
        return
    found = to_configdict(from_configdict(found)).to_dict()
    changed = [
        difference
        for difference in differences(found, to_configdict(cfg).to_dict())
        if not difference.startswith(MAY_CHANGE + (() if cfg.needs_masks else MASKS))
    ]
    if changed:
        raise SetupError(
            f"--workdir {workdir} holds a run of another config: {'; '.join(changed)} "
            f"(there; here). Choose another --workdir, or the config that began it."
        )


def make(workdir: epath.Path, cfg: Config, fixed: dict) -> None:
    """Makes the workdir with what the run begins from: the config and the tokenizer.

    Raises:
      SetupError: it cannot be written, or is another one on another host.
    """
    config = workdir / "config.json"
    try:
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            if not config.exists():
                frozen.save(fixed, cfg, workdir)
                write_json(config, to_configdict(cfg).to_dict())
    except OSError as error:
        raise SetupError(
            f"--workdir {workdir} cannot be written: {error}. Choose a directory that you own."
        ) from None


def check_shared(workdir: epath.Path) -> None:
    """Raises SetupError unless this process sees the workdir that process 0 has made."""
    distributed.barrier("workdir")
    waited = time.monotonic()
    while not (workdir / "config.json").exists():  # network file systems are late by seconds
        if time.monotonic() - waited > SHARED_WITHIN:
            raise SetupError(
                f"--workdir {workdir} of process 0 is not there on {socket.gethostname()}. Give a "
                f"directory that all hosts share (gs://, NFS, Lustre)."
            )
        time.sleep(0.5)


def record_environment(workdir: epath.Path, step: int, mesh: Mesh) -> None:
    """Notes in environment.json what the steps after `step` run on."""
    if jax.process_index() == 0:
        path, now = workdir / "environment.json", environment.collect(list(mesh.devices.flat))
        try:
            parts = json.loads(path.read_text()) if path.exists() else []
        except json.JSONDecodeError as error:
            raise SetupError(f"{path} cannot be read: {error}. Remove it to go on.") from None
        write_json(path, environment.continued(parts, step, now))
