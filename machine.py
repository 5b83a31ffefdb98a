"""The memory and the cores that this process may use: of the machine, or less in a container or with an affinity mask.

Containers limit both through control groups (cgroups). Version 2 has one tree of them, version 1 a tree for each kind of limit;
the files of both are read here: https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/memory.html.
"""
import contextlib
import math
import os
import re
from pathlib import Path

from cli import UserError

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def main_memory() -> tuple[int, int] | None:
    """(free, total) bytes of memory for this process; None if the system does not tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):    # Windows
        return None
    free = total
    with contextlib.suppress(OSError):      # only Linux tells how much is free
        free = 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])
    for folder in own_cgroups("memory"):
        limit = read_number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = read_number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            total, free = min(total, limit), min(free, max(0, limit - used + reclaimable(folder)))
    return free, total


def check_memory(what: str, needed: int, memory: tuple | None, where: str, hint: str) -> str:
    """Describe the bytes needed and free, such as "1.2 GB; 8.0 GB free".

    memory: (free, total) bytes, or None if they are not known

    Raises UserError, which ends with `hint`, if too few are free.
    """
    needs = f"{needed / 1e9:.1f} GB"
    if memory is None:
        return needs
    free, total = memory
    if needed > free:
        raise UserError(f"{what} needs {needs}, and {where} has {free / 1e9:.1f} of its {total / 1e9:.1f} GB free; {hint}")
    return f"{needs}; {free / 1e9:.1f} GB free"


def usable_cores() -> int:
    """How many cores this process may keep busy: at most those of its affinity mask, and of the quota of its cgroups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *(math.ceil(quota) for folder in own_cgroups("cpu") if (quota := cpu_quota(folder)))])


def cpu_quota(folder):
    """How many cores' time a cgroup may use; None if there is no limit."""
    with contextlib.suppress(OSError):
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    quota, period = (read_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return quota / period if quota and quota > 0 else None      # -1: no limit


def own_cgroups(kind):
    """The folders of this process's cgroup and of all cgroups around it: of version 2, and of version 1 for this kind of limit.

    Inside a container, OWN_CGROUPS may show the host's path; then only the top folder exists.
    """
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:     # not on Linux
        return []
    folders = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "" or kind in kinds.split(","):
            top = CGROUPS / kind if kinds else CGROUPS
            own = top / path.lstrip("/")
            folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(top)]
    return folders


def read_number(*paths):
    """The number in the first of these files that can be read; None if there is none: "max" means no limit."""
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            return int(path.read_text())
    return None


def reclaimable(folder):
    """Bytes of a cgroup's memory that the kernel frees when they are needed: pages of files."""
    with contextlib.suppress(OSError):
        numbers = dict(re.findall(r"^(\w+) (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE))
        return sum(int(numbers.get(f"total_{name}", numbers.get(name, 0))) for name in ("inactive_file", "active_file"))
    return 0
