"""What a process runs on: versions, devices, and the commit of this code."""

import datetime
import hashlib
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
COMMIT, DATE, FROM_STEP = "commit", "date", "from_step"
CHANGES = " with changes"  # after the commit where files of it were edited


def collect(devices: Sequence[jax.Device]) -> dict[str, str | int]:
    """The environment of this process, which computes on `devices` (of all processes)."""
    kinds = Counter(device.device_kind for device in devices)
    return {
        "devices": ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())),
        "hosts": jax.process_count(),
        "CPUs per host": os.cpu_count() or 0,
        "system": platform.platform(),
        **versions(),
        COMMIT: commit(Path(__file__)),
        DATE: datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds"),
    }


def versions() -> dict[str, str]:
    """Of Python and of what computes."""
    found = {package: metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **found}


def sources() -> dict[str, str]:
    """Start of the SHA-256 of each file of this package, by its path in it."""
    root = Path(__file__).parent
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in sorted(root.rglob("*.py"))
    }


def commit(file: Path) -> str:
    """The git commit that `file` belongs to; "" where git does not track it, or is missing."""
    try:
        _git(file.parent, "ls-files", "--error-unmatch", "--", file.name)
        found = _git(file.parent, "rev-parse", "HEAD")
        changed = _git(file.parent, "status", "--porcelain", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return ""
    return found + CHANGES * bool(changed)


def continued(parts: list[dict], step: int, now: dict) -> list[dict]:
    """The environments of a run that goes on after `step` in the environment `now`.

    Each begins with the step after which it was in use; one that did not change (but for the
    date) is kept as it was. Those of steps that are done again are dropped.
    """
    kept = [part for part in parts if part[FROM_STEP] < step]
    if kept and same(kept[-1], now):
        return kept
    return [*kept, {FROM_STEP: step, **now}]


def same(a: dict, b: dict) -> bool:
    """Whether two environments differ by nothing but the date."""
    return all(a.get(k) == b.get(k) for k in (a.keys() | b.keys()) - {DATE, FROM_STEP})


def _git(directory: Path, *arguments: str) -> str:
    command = ("git", "-C", str(directory), *arguments)
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=10
    ).stdout.strip()
