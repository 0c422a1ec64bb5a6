"""Pure: what an agent that has just started makes of its file and of the processes that it finds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from services.worker.agent.decide import KnownProcess
from services.worker.agent.processes import FoundProcess
from shared.messages import WorkerSpec

DEVICE_VARIABLE = "ROUNDHOUSE_DEVICE"
SPEC_VARIABLE = "ROUNDHOUSE_WORKER_SPEC"


def adopt(
    remembered: Iterable[KnownProcess], found: Iterable[FoundProcess], now_unix_ms: int
) -> dict[str, KnownProcess]:
    """Return all incarnations that this node knows, by name.

    1. Remembered as exited -> stays so.
    2. Remembered as intended or running, and its process is found -> running, adopted.
    3. Remembered as running, not found -> exited while nobody watched.
    4. Remembered as intended, not found -> exited, never started: the last agent died before the spawn.
    5. Found, but not remembered (the file was lost) -> running; the rest is read from its environment.
    Only session leaders count as a worker's process.
    """
    leaders = {process.incarnation: process for process in found if process.leader}
    known: dict[str, KnownProcess] = {}
    for record in remembered:
        leader = leaders.get(record.incarnation)
        if not record.alive:
            known[record.incarnation] = record
        elif leader is not None:
            known[record.incarnation] = _running(record, leader)
        else:
            reason = (
                "ended while no agent watched"
                if record.state == "running"
                else "never started: the agent died before it"
            )
            known[record.incarnation] = msgspec.structs.replace(
                record, state="exited", reason=reason, ended_unix_ms=now_unix_ms
            )
    for incarnation, leader in leaders.items():
        if incarnation not in known:
            known[incarnation] = _running(_from_environment(incarnation, leader.environment), leader)
    return known


def _running(record: KnownProcess, leader: FoundProcess) -> KnownProcess:
    return msgspec.structs.replace(record, state="running", pid=leader.pid, start_ticks=leader.start_ticks)


def _from_environment(incarnation: str, environment: Mapping[str, str]) -> KnownProcess:
    device = environment.get(DEVICE_VARIABLE, "")
    try:
        spec = msgspec.json.decode(environment.get(SPEC_VARIABLE, "").encode(), type=WorkerSpec)
    except msgspec.DecodeError:
        # It is ours by its marks, so it is reported; the scheduler does not know its seat and will have it stopped.
        return KnownProcess(incarnation=incarnation, state="running", device=device)
    return KnownProcess(
        incarnation=incarnation,
        resource_id=spec.resource_id,
        place=spec.place,
        state="running",
        device=device,
    )
