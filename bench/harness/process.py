"""What a process takes of the machine."""

from __future__ import annotations

import sys
from pathlib import Path


def memory() -> dict[str, int]:
    """MiB of the process: its peak so far, and its present size where there is a ``/proc``."""
    import resource  # not on Windows, where all but this runs

    unit = 2**20 if sys.platform == "darwin" else 2**10
    found = {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit}
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return found
    return {**found, "rss_mib": pages * resource.getpagesize() // 2**20}
