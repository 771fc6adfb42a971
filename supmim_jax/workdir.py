"""A run's directory: what it must hold before a run begins or goes on, and who else sees it."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator

import jax
from etils import epath
from jax.sharding import Mesh

from supmim_jax import environment, multihost, storage, tokenizers
from supmim_jax.config import Config
from supmim_jax.config.configdict import differences, from_configdict, to_configdict
from supmim_jax.errors import SetupError
from supmim_jax.metrics import write_json

# Where a run goes on, how it reads, logs and saves may change between its parts.
MAY_CHANGE = (
    "config.mesh.",
    "config.log.",
    "config.eval.",
    "config.checkpoint.",
    "config.watch.",
    "config.tokens.cache:",  # the same tokens elsewhere, or made in the step: frozen.check_kept
    "config.objective.target.path:",
    "config.data.data_dir:",
    "config.data.workers:",
    "config.data.threads:",
    "config.data.prefetch:",
    "config.data.max_broken:",
)
LOCK = "lock"
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # as Lustre mounted without flock
SHARED_WITHIN = 20  # seconds after which every host must see a file that another one wrote
MASKS = ("config.data.masks.",)  # may change where only an evaluation reads them


@contextlib.contextmanager
def taken(workdir: epath.Path, cfg: Config) -> Iterator[None]:
    """The workdir, made if need be, belongs to this run alone as long as the context is open.

    The kernel gives the lock of a process that was killed free at once. Object stores (gs://) and
    some mounts have no locks; there nothing is checked.

    Raises:
      SetupError: another run has it, it cannot be written, or `check` finds it changed.
    """
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                storage.make_directory(workdir)
                if storage.is_local(workdir):
                    file = stack.enter_context(open(workdir / LOCK, "a+"))
                    _lock(file, workdir, fcntl.LOCK_EX)
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                    file.flush()
            except OSError as error:
                raise SetupError(
                    f"--workdir {workdir} cannot be written: {error}. Choose a directory that you "
                    f"own."
                ) from None
            _check_config(workdir, cfg)  # again: a run may have ended in it meanwhile
        yield


def _lock(file, workdir: epath.Path, how: int) -> None:
    """Raises SetupError if another run has locked the file."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise SetupError(
            f"--workdir {workdir} belongs to a run that goes on: {file.read().strip()}. Choose "
            f"another --workdir, or end that run first."
        ) from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise


def check(workdir: epath.Path, cfg: Config) -> None:
    """Raises SetupError if the workdir holds a run that goes on, or one of another config."""
    if jax.process_index() == 0 and storage.is_local(workdir) and (workdir / LOCK).exists():
        with open(workdir / LOCK) as file:  # or it would be found out after a start of minutes
            _lock(file, workdir, fcntl.LOCK_SH)
    _check_config(workdir, cfg)


def _check_config(workdir: epath.Path, cfg: Config) -> None:
    path = workdir / "config.json"
    try:
        found = json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError, RecursionError) as error:
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


def results(workdir: epath.Path) -> dict:
    """What a complete run found.

    Raises:
      SetupError: the file cannot be read.
    """
    path = workdir / "results.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SetupError(f"{path} cannot be read: {error}. Remove it to evaluate again.") from None


def make(workdir: epath.Path, cfg: Config, fixed: dict) -> None:
    """Writes what the run begins from: the config and the tokenizer.

    Raises:
      SetupError: it cannot be written, or is another one on another host.
    """
    config = workdir / "config.json"
    try:
        if jax.process_index() == 0 and not config.exists():
            tokenizers.save(fixed, cfg, workdir)
            write_json(config, to_configdict(cfg).to_dict())
    except OSError as error:
        raise SetupError(
            f"--workdir {workdir} cannot be written: {error}. Choose a directory that you own."
        ) from None


def check_shared(workdir: epath.Path) -> None:
    """Raises SetupError unless this process sees the workdir that process 0 has made."""
    multihost.barrier("workdir")
    waited = time.monotonic()
    while not (workdir / "config.json").exists():  # network file systems are late by seconds
        if time.monotonic() - waited > SHARED_WITHIN:
            raise SetupError(
                f"--workdir {workdir} of process 0 is not there on {socket.gethostname()}. Give a "
                f"directory that all hosts share (gs://, NFS, Lustre)."
            )
        time.sleep(0.5)


def record_environment(workdir: epath.Path, step: int, mesh: Mesh) -> None:
    """Notes in environment.json what the steps after `step` run on.

    Raises:
      SetupError: it cannot be read, or the steps before ran with other settings of JAX.
    """
    if jax.process_index() == 0:
        path, now = workdir / "environment.json", environment.collect(list(mesh.devices.flat))
        try:
            parts = json.loads(path.read_text()) if path.exists() else []
            if not isinstance(parts, list) or not all(
                isinstance(x, dict) and environment.FROM_STEP in x for x in parts
            ):
                raise ValueError(f"it is no list of objects with {environment.FROM_STEP}")
        except (OSError, ValueError, RecursionError, TypeError) as error:
            raise SetupError(f"{path} cannot be read: {error}. Remove it to go on.") from None
        _check_flags(parts, step, now, workdir)
        write_json(path, environment.continued(parts, step, now))


def _check_flags(parts: list[dict], step: int, now: dict, workdir: epath.Path) -> None:
    """Raises SetupError if the steps until `step` were drawn or rounded in another way."""
    before = ([part for part in parts if part[environment.FROM_STEP] < step] or [now])[-1]
    changed = [x for x in environment.FLAGS if x in before and before[x] != now[x]]
    if changed:
        found = "; ".join(f"{x.upper()}: {before[x]}; {now[x]}" for x in changed)
        raise SetupError(
            f"--workdir {workdir} holds a run of other settings of JAX: {found} (there; here). "
            f"The steps after {step} would draw or round other numbers. Set these variables as "
            f"they were (None: unset), or choose another --workdir."
        )
