"""How many sockets a gateway has room for: the files that it may open, and the memory that it may fill."""

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Final

import psutil

from engine.limits import FILES_RESERVED, SOCKETS_MAX

_STATM: Final = Path("/proc/self/statm")
_CGROUP_LIMITS: Final = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def raise_file_limit() -> int:
    """Let this process, and those that it starts, open as many files as it could use and the system allows.

    Returns how many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = SOCKETS_MAX + FILES_RESERVED
    if soft >= wanted:
        return soft
    is_enough = hard == resource.RLIM_INFINITY or hard >= wanted
    # Only who has the right to (root has it) may raise the hard limit.
    for limits in [(wanted, hard)] if is_enough else [(wanted, wanted), (hard, hard)]:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        except (OSError, ValueError):
            continue
        return limits[0]
    return soft


def sockets_for(files: int) -> int:
    """How many sockets a gateway takes that may open so many files; some are for links, logs, Postgres and HTTP."""
    return min(SOCKETS_MAX, files - min(FILES_RESERVED, files // 2))


def connections_for(files: int) -> int:
    """How many connections such a gateway keeps: its sockets, and half of the rest for HTTP and those that are ending.

    The other half is for links, logs and Postgres, whatever clients do.
    """
    return sockets_for(files) + min(FILES_RESERVED, files // 2) // 2


def resident_bytes() -> int:
    """The memory that this process fills."""
    if _STATM.exists():
        return int(_STATM.read_bytes().split()[1]) * resource.getpagesize()
    return int(psutil.Process().memory_info().rss)


def memory_share_bytes(gateways: int) -> int:
    """What one of so many gateways may fill: they have half of the machine's memory, or the container's."""
    limits = [path.read_text().strip() for path in _CGROUP_LIMITS if os.access(path, os.R_OK)]
    sizes = [int(limit) for limit in limits if limit.isdigit()]
    return min([psutil.virtual_memory().total, *sizes]) // 2 // gateways


class MemoryGauge:
    """Whether there is memory for newcomers: not over the bound, and then not until it is a tenth under it."""

    def __init__(self, bytes_max: int, resident: Callable[[], int] = resident_bytes) -> None:
        self._bytes_max = bytes_max
        self._resident = resident
        self.is_short = False

    def look(self) -> bool:
        """Look how it is now: whether it is short."""
        self.is_short = self._resident() > (self._bytes_max * 9 // 10 if self.is_short else self._bytes_max)
        return self.is_short
