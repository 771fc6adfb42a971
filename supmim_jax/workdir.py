"""A run's directory: what it must hold before a run starts or resumes, and who else uses it."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
from etils import epath
from jax.sharding import Mesh

from supmim_jax import environment, multihost, storage
from supmim_jax.config import Config
from supmim_jax.config.configdict import differences, from_configdict, section, to_configdict
from supmim_jax.errors import SetupError
from supmim_jax.tokenizers import Frozen

# Where a run goes on, how it reads, logs and saves may change between its parts.
MAY_CHANGE = (
    "config.mesh.",
    "config.log.",
    "config.eval.",
    "config.checkpoint.",
    "config.watch.",
    "config.tokens.cache:",  # the same tokens elsewhere, or made in the step: see Frozen.identity
    "config.objective.target.path:",
    "config.data.data_dir:",
    "config.data.workers:",
    "config.data.threads:",
    "config.data.prefetch:",
    "config.data.max_broken:",
)
MASKS = ("config.data.masks.",)  # may change where only an evaluation reads them
LOCK, CLASS_NAMES = "lock", "class_names.json"
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # as Lustre mounted without flock
SHARED_WITHIN = 20  # seconds after which every host must see a file that another one wrote


@dataclass(frozen=True)
class Workdir:
    """The directory of a run of `cfg`, checked; `claimed` locks it for this run."""

    path: epath.Path
    cfg: Config

    @classmethod
    def open(cls, path: str | os.PathLike, cfg: Config) -> "Workdir":
        """The directory, which need not exist; nothing is written.

        Raises:
          SetupError: it holds a run that goes on, or one of another config.
        """
        workdir = cls(storage.location(path), cfg)
        lock = workdir.path / LOCK
        if jax.process_index() == 0 and storage.is_local(lock) and lock.exists():
            with open(lock) as file:  # or it would be found out after a start of minutes
                workdir._lock(file, fcntl.LOCK_SH)
        workdir._check_config()
        return workdir

    def results(self) -> dict | None:
        """The final results of the run; None until it is complete.

        Raises:
          SetupError: the file cannot be read.
        """
        path = self.path / "results.json"
        return storage.read_json(path, "Remove it to evaluate again.") if path.exists() else None

    def check_evaluated(self) -> None:
        """Raises SetupError if config.eval.which names more than a complete run was judged by."""
        saved = from_configdict(storage.read_json(self.path / "config.json", "Restore it."))
        if missing := [name for name in self.cfg.eval.which if name not in saved.eval.which]:
            raise SetupError(
                f"{self.path} is complete and was not judged by {', '.join(missing)} of "
                f"config.eval.which. Measure that with `python -m supmim_jax.probe --checkpoint "
                f"{self.path}`, or remove {self.path / 'results.json'} to evaluate again."
            )

    @contextlib.contextmanager
    def claimed(self, frozen: Frozen, class_names: Sequence[str] = ()) -> Iterator[None]:
        """Makes the workdir if needed, and locks it for this run while the context is open.

        A new one is given what the run begins from: the config, the tokenizer, and the names of the
        classes, which are needed where the encoder is used and the data set is not. The kernel
        frees the lock of a process that was killed at once. Object stores (gs://) and some mounts
        have no locks; there nothing is checked.

        Raises:
          SetupError: another run has it, its config has changed, it cannot be written, or not all
            hosts see it.
        """
        with contextlib.ExitStack() as stack:
            if jax.process_index() == 0:
                try:
                    storage.make_directory(self.path)
                    if storage.is_local(self.path):
                        file = stack.enter_context(open(self.path / LOCK, "a+"))
                        self._lock(file, fcntl.LOCK_EX)
                        file.truncate(0)
                        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                        file.flush()
                    self._check_config()  # again: a run may have ended in it meanwhile
                    config = self.path / "config.json"
                    if not config.exists():
                        frozen.save(self.cfg, self.path)
                        if class_names:
                            storage.write_json(self.path / CLASS_NAMES, class_names)
                        storage.write_json(config, to_configdict(self.cfg).to_dict())
                except OSError as error:
                    raise SetupError(
                        f"--workdir {self.path} cannot be written: {error}. Choose another "
                        f"directory, one that you can write."
                    ) from None
            self._check_shared()
            yield

    def record_environment(self, step: int, mesh: Mesh) -> None:
        """Records in environment.json what the steps after `step` run on.

        Raises:
          SetupError: it cannot be read, or the steps before ran with other settings of JAX.
        """
        if jax.process_index() == 0:
            path = self.path / "environment.json"
            parts = storage.read_json(path, "Remove it to go on.") if path.exists() else []
            if not isinstance(parts, list) or not all(
                isinstance(x, dict) and environment.FROM_STEP in x for x in parts
            ):
                raise SetupError(
                    f"{path} is no list of objects with {environment.FROM_STEP}. Remove it to go "
                    f"on."
                )
            now = environment.collect(list(mesh.devices.flat))
            self._check_flags(parts, step, now)
            storage.write_json(path, environment.continued(parts, step, now))

    def _lock(self, file, how: int) -> None:
        """Raises SetupError if another run has locked the file."""
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise SetupError(
                f"--workdir {self.path} belongs to a run that goes on: {file.read().strip()}. "
                f"Choose another --workdir, or end that run first."
            ) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise

    def _check_config(self) -> None:
        path = self.path / "config.json"
        if not path.exists():
            return
        saved = section(from_configdict(storage.read_json(path, "Choose another --workdir.")))
        changed = [
            difference
            for difference in differences(saved, to_configdict(self.cfg).to_dict())
            if not difference.startswith(MAY_CHANGE + (() if self.cfg.needs_masks else MASKS))
        ]
        if changed:
            raise SetupError(
                f"--workdir {self.path} holds a run of another config: {'; '.join(changed)} "
                f"(there; here). Choose another --workdir, or the config that began it."
            )

    def _check_shared(self) -> None:
        """Raises SetupError unless this process sees the workdir that process 0 has made."""
        multihost.barrier("workdir")
        begin = time.monotonic()
        while not (self.path / "config.json").exists():  # network file systems are late by seconds
            if time.monotonic() - begin > SHARED_WITHIN:
                raise SetupError(
                    f"--workdir {self.path} of process 0 is not there on {socket.gethostname()}. "
                    f"Give a directory that all hosts share (gs://, NFS, Lustre)."
                )
            time.sleep(0.5)

    def _check_flags(self, parts: list[dict], step: int, now: dict) -> None:
        """Raises SetupError if earlier steps drew or rounded numbers in another way."""
        before = ([part for part in parts if part[environment.FROM_STEP] < step] or [now])[-1]
        changed = [x for x in environment.FLAGS if x in before and before[x] != now[x]]
        if changed:
            settings = "; ".join(f"{x.upper()}: {before[x]}; {now[x]}" for x in changed)
            raise SetupError(
                f"--workdir {self.path} holds a run of other settings of JAX: {settings} (there; "
                f"here). The steps after {step} would draw or round other numbers. Set these "
                f"variables as they were (None: unset), or choose another --workdir."
            )


def class_names(path: epath.Path) -> list[str]:
    """The names of a classifier's outputs, in order; [] if the run did not record them.

    Raises:
      SetupError: the file cannot be read.
    """
    file = path / CLASS_NAMES
    return storage.read_json(file, "Remove it to go on without.") if file.exists() else []
