"""What Linux tells of Grain's worker processes: which they are, and their CPU time."""

import contextlib
import os
from pathlib import Path

from supmim_jax.errors import SetupError


def workers() -> list[int]:
    """Process ids of what multiprocessing has started from this process and is still alive.

    Raises:
      SetupError: this system has no /proc.
    """
    if not Path("/proc/self/task").exists():
        raise SetupError("CPU time is read from /proc, which this system lacks: measure on Linux.")
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                if b"spawn_main" in Path("/proc", pid, "cmdline").read_bytes():
                    found.append(int(pid))
    return sorted(found)


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process, in steps of the kernel's clock (10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
