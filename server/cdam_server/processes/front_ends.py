"""How many front ends a server has."""

import math
import os
import sys
from pathlib import Path
from typing import Final

from cdam_server.settings.config import Settings

# Front ends. More hardly serve more, and each takes memory; who feeds so many devices that it is too few, says so.
_MOST: Final = 16
# Cores. With so few, those that compute and those that serve take turns on all of them.
_SHARED_CORES: Final = 2
_CPU_LIMIT: Final = Path("/sys/fs/cgroup/cpu.max")


def number_of(settings: Settings) -> int:
    """As many as the settings say; if they don't, one for each core that no device needs."""
    if settings.front_ends is not None:
        return settings.front_ends
    if settings.address.startswith("unix:") or sys.platform != "linux":  # elsewhere a shared port goes to one of them
        return 1
    cores = _cores()
    free = cores if cores <= _SHARED_CORES else cores - len(settings.devices)
    return min(max(free, 1), _MOST)


def _cores() -> int:
    """The cores that this process may use: a container may have a part of the machine's."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _CPU_LIMIT.read_text().split()
    except (OSError, ValueError):  # another system of control groups, or none
        return cores
    return cores if quota == "max" else min(cores, math.ceil(int(quota) / int(period)))
