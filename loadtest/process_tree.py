"""What a process and its children take of the machine, from /proc."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Taken:
    resident_bytes: int
    processor_s: float
    """Of those that live, and of children that ended and were waited for."""


def process_tree(pid: int) -> Taken:
    """Nothing for a process that does not exist."""
    stats = _stats()
    children: dict[int, list[int]] = {}
    for each, fields in stats.items():
        children.setdefault(int(fields[1]), []).append(each)
    ticks, pages, todo = 0, 0, [pid]
    while todo:
        current = todo.pop()
        todo += children.get(current, [])
        if current in stats:
            ticks += sum(map(int, stats[current][11:15]))
            pages += int(stats[current][21])
    return Taken(pages * os.sysconf("SC_PAGESIZE"), ticks / os.sysconf("SC_CLK_TCK"))


def parent_of(pid: int) -> int:
    """Raises KeyError for a process that does not exist."""
    return int(_stats()[pid][1])


def _stats() -> dict[int, list[str]]:
    """The fields of each process's stat from its state on: the name before it may hold anything."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
    return found
