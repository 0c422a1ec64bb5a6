"""What machine the numbers of `loadtest.engine` are of, and how much of it was somebody else's meanwhile."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import sys
from pathlib import Path

from loadtest.engine_models import LLAMACPP_PACKAGES

_IDLE_FIELDS = (3, 4)  # idle and iowait, of a "cpu" line in /proc/stat
_COUNTED_FIELDS = 8  # up to steal: guests' time is in user's already


def describe_machine() -> str:
    """Cores, CPU and the versions that matter, as one line."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    versions += [
        f"xllamacpp {found.version}"
        for found in importlib.metadata.distributions(name="xllamacpp", path=[str(LLAMACPP_PACKAGES)])
    ]
    cpu = names[0] if names else "a CPU without a name"
    return f"{os.cpu_count()} cores ({cpu}), python {sys.version.split()[0]}, {', '.join(versions)}"


class OthersShare:
    """Counts from its making. Children count as ours once they have ended and were waited for."""

    def __init__(self) -> None:
        self._all_s, self._busy_s = read_cpu_seconds(Path("/proc/stat").read_text(encoding="ascii"))
        self._ours_s = _own_cpu_seconds()

    def percent(self) -> float:
        """Of all cores' time, what other processes and other machines on the same host took."""
        all_s, busy_s = read_cpu_seconds(Path("/proc/stat").read_text(encoding="ascii"))
        others_s = (busy_s - self._busy_s) - (_own_cpu_seconds() - self._ours_s)
        return max(0.0, 100 * others_s / max(all_s - self._all_s, 1e-9))


def read_cpu_seconds(stat: str) -> tuple[float, float]:
    """stat: the text of /proc/stat. Seconds since boot of all cores together: all, and not idle (stolen ones included)."""
    ticks = [int(value) for value in stat.splitlines()[0].split()[1 : 1 + _COUNTED_FIELDS]]
    idle = sum(ticks[index] for index in _IDLE_FIELDS)
    per_second = os.sysconf("SC_CLK_TCK")
    return sum(ticks) / per_second, (sum(ticks) - idle) / per_second


def _own_cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
