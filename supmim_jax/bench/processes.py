"""What Linux tells of this process and of Grain's worker processes: memory, CPU time, libraries."""

import contextlib
import os
from pathlib import Path

from supmim_jax.errors import SetupError

# A package that maps a library into memory, by a part of that library's path.
LIBRARIES = {
    "jax": "/jaxlib/",
    "tensorflow": "/tensorflow/",
    "cv2": "/cv2/",
    "array_record": "/array_record/",
    "sklearn": "/sklearn/",
    "matplotlib": "/matplotlib/",
}
MIB = 1024  # kB, in which /proc counts


def workers() -> list[int]:
    """Process ids of what multiprocessing has started from this process and is still alive.

    Raises:
      SetupError: this system has no /proc.
    """
    if not Path("/proc/self/smaps_rollup").exists():
        raise SetupError("Memory is read from /proc, which this system lacks: measure on Linux.")
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                if b"spawn_main" in Path("/proc", pid, "cmdline").read_bytes():
                    found.append(int(pid))
    return sorted(found)


def memory(pid: int) -> dict[str, float]:
    """MB resident (rss) and MB with shared pages divided among those who share them (pss)."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, kilobytes = line.split()[:2]
        found[name.rstrip(":").lower()] = float(kilobytes)
    return {name: found[name] / MIB for name in ("rss", "pss")}


def libraries(pid: int) -> list[str]:
    """The packages of LIBRARIES that this process has loaded."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return [name for name, part in LIBRARIES.items() if part in maps]


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process, in steps of the kernel's clock (10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def state() -> dict[str, dict]:
    """Memory and libraries of this process ("main") and of each worker, by its place and pid."""
    pids = {"main": os.getpid()} | {f"worker {i}": pid for i, pid in enumerate(workers())}
    return {
        name: {"pid": pid, **memory(pid), "libraries": libraries(pid)} for name, pid in pids.items()
    }
