"""How much memory, disk and how many cores a process may still take."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Returns bytes of memory that can still be taken: those of the machine, or of the container where it has fewer."""
    import psutil  # comes with accelerate

    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        pairs = (line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        cached = int(dict(pairs).get("inactive_file", 0))  # counts as used, but is given up first
    except (OSError, ValueError):
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used + cached))


def free_disk(folder: Path) -> int:
    """Returns free bytes of the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_processes(accelerator: Accelerator) -> int:
    """Returns how many processes of the run share this machine."""
    return max(1, min(accelerator.num_processes, int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))))
