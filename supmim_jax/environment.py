"""What a process runs on: versions, devices, and the commit of this code."""

import datetime
import hashlib
import os
import platform
import subprocess
import traceback
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
COMMIT, DATE, FROM_STEP = "commit", "date", "from_step"
# JAX's settings that decide which numbers are drawn and how they are rounded; for each there is a
# variable of the same name in capitals.
FLAGS = (
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
    "jax_default_matmul_precision",
)
# Variables that may change rounding, among many other things: noted where they are set.
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
# What the code relies on: with any other value it fails, or makes arrays of other types.
RELIED_ON = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
}
CHANGES = " with changes"  # after the commit where files of it were edited


def collect(devices: Sequence[jax.Device]) -> dict[str, str | int]:
    """The environment of this process, which computes on `devices` (of all processes)."""
    kinds = Counter(device.device_kind for device in devices)
    return {
        "devices": ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())),
        "hosts": jax.process_count(),
        "CPUs per host": os.cpu_count() or 0,
        "CPU": processor(),
        "system": platform.platform(),
        **versions(),
        **flags(),
        **{name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        COMMIT: commit(Path(__file__)),
        DATE: datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds"),
    }


def processor() -> str:
    """The model of this host's CPU, by which XLA and NumPy choose instructions, and so rounding."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    found = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    numbers = [
        f"{name} {found[name]}" for name in ("cpu family", "model", "stepping") if name in found
    ]
    return ", ".join([found.get("model name", platform.machine()), *numbers])


def versions() -> dict[str, str]:
    """The versions of Python and of PACKAGES."""
    found = {package: metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **found}


def flags() -> dict[str, str]:
    """The values of FLAGS, as text."""
    return {name: str(getattr(jax.config, name)) for name in FLAGS}


def rely() -> None:
    """Sets JAX's settings to RELIED_ON, whatever the environment variables say."""
    for name, value in RELIED_ON.items():
        jax.config.update(name, value)


def no_device(error: Exception) -> str | None:
    """What to do about an error that JAX raised while looking for devices; None for others."""
    frames = [
        frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    if "jax._src.xla_bridge" not in frames or not isinstance(error, (RuntimeError, AssertionError)):
        return None
    asked = jax.config.jax_platforms
    text = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0]
    said = f": {text.removesuffix('.')}" if text else ""
    try:
        jax.config.update("jax_platforms", "")
        there = f" There is {', '.join(sorted({x.platform for x in jax.devices()}))}."
    except Exception:  # the same again, or worse
        there = ""
    return (
        f"JAX_PLATFORMS is {asked!r}, and JAX has no such device to use on {platform.node()}{said}."
        f"{there} Unset JAX_PLATFORMS or name what is there. For a device that should be there, "
        f"see that its packages are installed (pip install -e '.[cuda]' or '.[tpu]') and that its "
        f"driver sees it (nvidia-smi; CUDA_VISIBLE_DEVICES)."
    )


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
    """The environments of a run that is resumed after `step` in the environment `now`.

    Each begins with the step after which it was in use; one that did not change (but for the
    date) is kept as it was. Those of steps that are done again are dropped.
    """
    kept = [part for part in parts if part[FROM_STEP] < step]
    if kept and same(kept[-1], now):
        return kept
    return [*kept, {FROM_STEP: step, **now}]


def same(a: dict, b: dict) -> bool:
    """Whether two environments differ in nothing but the date."""
    return all(a.get(k) == b.get(k) for k in (a.keys() | b.keys()) - {DATE, FROM_STEP})


def _git(directory: Path, *arguments: str) -> str:
    command = ("git", "-C", str(directory), *arguments)
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=10
    ).stdout.strip()
