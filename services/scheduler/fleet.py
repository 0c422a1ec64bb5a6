"""The latest reports of nodes and workers, kept in memory: each scheduler hears all of them, a standby too."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Generic, TypeVar

from shared.messages import FleetEvent, NodeReport, WorkerReport

R = TypeVar("R", NodeReport, WorkerReport)

OFFSET_CREEP = 0.1
"""How fast the least seen delay may grow, per second: a clock that was set back is believed again after a while."""
LONGEST_BREAK_S = 3.0
FORGET_WORKER_S = 900.0
FORGET_NODE_S = 86_400.0


@dataclass(slots=True)
class _Delay:
    """Of one sender: the least seen difference between its clock and ours, and when it was last looked at."""

    least_s: float
    seen_at_s: float


class ReportDelays:
    """Tells how long a report was under way, though clocks differ from host to host.

    The least difference ever seen between our clock at receipt and the sender's at sending is taken as no delay. So
    a report that waited in a queue while the broker or we were away counts from when it was sent.
    """

    def __init__(self) -> None:
        self._delays: dict[str, _Delay] = {}

    def delay_s(self, sender: str, sent_unix_s: float, received_unix_s: float) -> float:
        difference_s = received_unix_s - sent_unix_s
        known = self._delays.get(sender)
        if known is None:
            self._delays[sender] = _Delay(difference_s, received_unix_s)
            return 0.0
        crept_s = known.least_s + OFFSET_CREEP * max(received_unix_s - known.seen_at_s, 0.0)
        known.least_s = min(difference_s, crept_s)
        known.seen_at_s = received_unix_s
        return difference_s - known.least_s

    def forget(self, sender: str) -> None:
        self._delays.pop(sender, None)

    def __len__(self) -> int:
        return len(self._delays)


@dataclass(frozen=True, slots=True)
class Heard(Generic[R]):
    report: R
    heard_at: float
    """Monotonic seconds of this process, less the time that the report was under way."""


class Watch:
    """Since when this scheduler can hear without a break. Nobody is called lost for a silence that was its own."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        self._last_look_s = float("-inf")

    def look(self, *, is_connected: bool, now_s: float) -> float | None:
        """Note one look and return since when; None while the broker is away. now_s: monotonic.

        A long time without a look (frozen, starved, not leading) is a break too: what was sent meanwhile may still
        wait to be read.
        """
        if not is_connected:
            self._since_s = None
        elif self._since_s is None or now_s - self._last_look_s > LONGEST_BREAK_S:
            self._since_s = now_s
        self._last_look_s = now_s
        return self._since_s


class Fleet:
    """Written by the consumer of reports alone; `changed` is set when a report says something new."""

    def __init__(self) -> None:
        self.nodes: dict[str, Heard[NodeReport]] = {}
        self.workers: dict[str, Heard[WorkerReport]] = {}
        self.changed = asyncio.Event()
        self._delays = ReportDelays()

    def hear(self, report: FleetEvent, *, now_unix_s: float, now_s: float) -> None:
        """Take in one report. now_unix_s: the wall clock; now_s: the monotonic one."""
        match report:
            case NodeReport():
                heard_at = now_s - self._delays.delay_s(
                    report.agent_id, report.sent_unix_ms / 1000, now_unix_s
                )
                before = self.nodes.get(report.node_id)
                if before is not None and before.report.agent_id != report.agent_id:
                    self._delays.forget(before.report.agent_id)
                if before is None or _node_facts(before.report) != _node_facts(report):
                    self.changed.set()
                self.nodes[report.node_id] = Heard(report, heard_at)
            case WorkerReport():
                heard_at = now_s - self._delays.delay_s(
                    report.incarnation, report.sent_unix_ms / 1000, now_unix_s
                )
                known = self.workers.get(report.incarnation)
                if known is None or known.report.phase != report.phase:
                    self.changed.set()
                self.workers[report.incarnation] = Heard(report, heard_at)

    def forget_old(self, now_s: float) -> None:
        """Drop senders that have been silent for long; what they held is in the database."""
        for incarnation in [k for k, v in self.workers.items() if now_s - v.heard_at > FORGET_WORKER_S]:
            del self.workers[incarnation]
            self._delays.forget(incarnation)
        for node_id in [k for k, v in self.nodes.items() if now_s - v.heard_at > FORGET_NODE_S]:
            self._delays.forget(self.nodes.pop(node_id).report.agent_id)


def _node_facts(report: NodeReport) -> object:
    return (
        report.agent_id,
        [(device.device, device.incarnation) for device in report.devices],
        [(process.incarnation, process.state) for process in report.processes],
    )
