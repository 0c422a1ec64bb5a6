"""Schedulers, a node agent and workers as real processes on a real broker and database."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from shared import topology
from shared.messages import DeleteResource, TurnOffResource, TurnOnResource
from shared.outcomes import Unroutable
from tests.conftest import Vhost
from tests.integration.fleet import Fleet, running_fleet
from tests.integration.test_autoscaling import free_port

__all__ = ["free_port"]  # a fixture


@pytest.fixture
async def fleet(tmp_path: Path, module_vhost: Vhost, module_database: str) -> AsyncIterator[Fleet]:
    async with running_fleet(tmp_path, module_vhost.amqp_url, module_database) as running:
        yield running


async def live_resource(fleet: Fleet, count: int = 1) -> str:
    resource_id = await fleet.create_resource(count)
    await fleet.turn_on(resource_id)
    await fleet.until(lambda: fleet.is_live(resource_id, count), "the resource is live")
    return resource_id


async def start_standby(fleet: Fleet, ops_port: int) -> None:
    """Start a scheduler beside the leader, and wait until it has connected."""
    fleet.start_scheduler(OPS_PORT=str(ops_port))

    async def is_ready() -> bool:
        try:
            async with aiohttp.ClientSession() as session:
                reply = await session.get(f"http://127.0.0.1:{ops_port}/readyz")
                return reply.status == 200
        except aiohttp.ClientConnectionError:
            return False

    await fleet.until(is_ready, "the standby is ready", 60)


async def test_a_resource_goes_live_is_proved_and_goes_off_without_leaving_a_process(fleet: Fleet) -> None:
    fleet.start_scheduler()
    fleet.start_agent()
    resource_id = await live_resource(fleet)
    # Twice is the same as once.
    await fleet.turn_on(resource_id)

    async def proved() -> bool:
        row = await fleet.database.fetchrow("SELECT * FROM scheduler.state_intervals")
        return row is not None and (row["proved_until"] - row["started_at"]).total_seconds() > 1

    await fleet.until(proved, "live time is proved")
    (fleet.behaviour / "busy").touch()
    await fleet.turn_off(resource_id)

    async def draining() -> bool:
        return await fleet.state(resource_id) == "draining"

    await fleet.until(draining, "the resource drains")
    await asyncio.sleep(1)
    assert len(fleet.workers()) == 1, "a drain cut a worker that had work"
    (fleet.behaviour / "busy").unlink()

    async def off() -> bool:
        return await fleet.state(resource_id) == "off"

    await fleet.until(off, "the resource is off")
    assert fleet.workers() == {}
    assert await fleet.places() == []
    interval = await fleet.database.fetchrow("SELECT * FROM scheduler.state_intervals")
    assert interval is not None and interval["ended_at"] == interval["proved_until"]
    assert interval["hourly_rate_nanousd"] == 10**9
    fleet.assert_no_double()


async def test_a_killed_worker_is_replaced_at_its_place_and_the_gap_is_not_billed(fleet: Fleet) -> None:
    fleet.start_scheduler()
    fleet.start_agent()
    resource_id = await live_resource(fleet, 2)
    before = await fleet.places()
    os.kill(fleet.workers()[before[0]["incarnation"]], signal.SIGKILL)

    async def replaced() -> bool:
        now = await fleet.places()
        return await fleet.is_live(resource_id, 2) and now[0]["incarnation"] != before[0]["incarnation"]

    await fleet.until(replaced, "place 0 has a new worker")
    after = await fleet.places()
    assert after[1]["incarnation"] == before[1]["incarnation"]
    words = [r["words"] for r in await fleet.database.fetch("SELECT words FROM scheduler.decisions")]
    assert "place 0 is free: the worker killed by signal 9" in words
    intervals = await fleet.database.fetch(
        "SELECT * FROM scheduler.state_intervals WHERE place = 0 ORDER BY started_at"
    )
    assert len(intervals) == 2 and intervals[0]["ended_at"] < intervals[1]["started_at"]
    fleet.assert_no_double()


async def test_scheduler_and_agent_killed_at_once_keep_their_worker_and_double_none(fleet: Fleet) -> None:
    scheduler, agent = fleet.start_scheduler(), fleet.start_agent()
    resource_id = await live_resource(fleet, 2)
    before = fleet.workers()
    # Given both dead, and one of the workers dying while nobody looks
    fleet.kill(scheduler)
    fleet.kill(agent)
    gone, kept = sorted(before)
    os.kill(before[gone], signal.SIGKILL)
    # When they come back
    fleet.start_agent()
    fleet.start_scheduler()

    async def mended() -> bool:
        now = fleet.workers()
        return await fleet.is_live(resource_id, 2) and gone not in now and len(now) == 2

    # Then the living worker is adopted, and only the dead one is replaced.
    await fleet.until(mended, "two workers again")
    assert fleet.workers()[kept] == before[kept]
    fleet.assert_no_double()


async def test_two_schedulers_and_kills_of_everything_while_scaling_never_double_a_seat(fleet: Fleet) -> None:
    scheduler, agent = fleet.start_scheduler(), fleet.start_agent()
    fleet.start_scheduler()
    resource_id = await live_resource(fleet, 1)
    for count, victim in ((3, "agent"), (1, "scheduler"), (3, "scheduler"), (2, "agent")):
        await fleet.scale(resource_id, count)
        await asyncio.sleep(0.35)  # somewhere in the middle of starts and drains
        if victim == "agent":
            fleet.kill(agent)
            agent = fleet.start_agent()
        else:
            fleet.kill(scheduler)
            scheduler = fleet.start_scheduler()
        assert len(await fleet.places()) <= 3
        assert len(fleet.workers()) <= 3

    async def settled() -> bool:
        return await fleet.is_live(resource_id, 2) and len(fleet.workers()) == 2

    await fleet.until(settled, "two workers in the end", 30)
    fleet.assert_no_double()


async def test_a_frozen_leader_is_replaced_and_refused_when_it_wakes(fleet: Fleet, free_port: int) -> None:
    # So long that a leader which stalls keeps it: it changes hands once
    fleet.environment["ROUNDHOUSE_LEASE_S"] = "5"
    first = fleet.start_scheduler()
    fleet.start_agent()
    resource_id = await live_resource(fleet, 1)
    await start_standby(fleet, free_port)
    epoch = await fleet.database.fetchval("SELECT epoch FROM scheduler.lease")
    first.send_signal(signal.SIGSTOP)

    async def taken_over() -> bool:
        return bool(await fleet.database.fetchval("SELECT epoch > $1 FROM scheduler.lease", epoch))

    await fleet.until(taken_over, "the standby leads")
    # Something for the old leader to do wrong: its picture of the world has one worker too few.
    await fleet.database.execute(
        "UPDATE scheduler.resources SET fixed_count = 3 WHERE resource_id = $1", resource_id
    )
    first.send_signal(signal.SIGCONT)
    await fleet.until(lambda: fleet.is_live(resource_id, 3), "the new leader scales")

    async def stepped_down() -> bool:
        log = (fleet.folder / "scheduler-0.log").read_text()
        return '"event": "lease_lost"' in log

    await fleet.until(stepped_down, "the old leader steps down")
    assert await fleet.database.fetchval("SELECT epoch FROM scheduler.lease") == epoch + 1
    assert len(fleet.workers()) == 3
    fleet.assert_no_double()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_standby_works_within_ten_seconds_of_its_leaders_end_as_they_are_set_up(
    fleet: Fleet, how: signal.Signals, free_port: int
) -> None:
    for name in ("ROUNDHOUSE_LEASE_S", "ROUNDHOUSE_SCHEDULER_TICK_S"):
        del fleet.environment[name]  # what everybody has
    first = fleet.start_scheduler()
    fleet.start_agent()
    resource_id = await live_resource(fleet, 1)
    await start_standby(fleet, free_port)
    await asyncio.sleep(3)  # it hears the reports
    first.send_signal(how)
    ended_s = time.monotonic()
    # Written as a command would: whoever runs commands, only a leader acts on what is wanted.
    await fleet.database.execute(
        "UPDATE scheduler.resources SET fixed_count = 2 WHERE resource_id = $1", resource_id
    )

    async def acts() -> bool:
        return len(await fleet.places()) == 2

    await fleet.until(acts, "the standby grants a place", 30)
    took_s = time.monotonic() - ended_s
    assert took_s < 10, took_s
    fleet.assert_no_double()


async def test_one_of_three_ready_is_live_and_says_what_the_others_wait_for(fleet: Fleet) -> None:
    fleet.start_scheduler()
    fleet.start_agent(ROUNDHOUSE_DEVICES="cpu:0")
    resource_id = await fleet.create_resource(3)
    await fleet.turn_on(resource_id)
    await fleet.until(lambda: fleet.is_live(resource_id, 1), "live with one")

    async def says_why() -> bool:
        reason = await fleet.database.fetchval("SELECT reason FROM scheduler.resources")
        return bool(reason == "1 of 3 ready; no free cpu device on any node")

    await fleet.until(says_why, "the reason is shown")
    fleet.start_agent(ROUNDHOUSE_NODE_ID=f"{fleet.node_id}-b", ROUNDHOUSE_DEVICES="cpu:0,cpu:1")

    async def all_three() -> bool:
        return [place["state"] for place in await fleet.places()] == ["ready"] * 3

    try:
        await fleet.until(all_three, "the others come with another node")
        assert await fleet.state(resource_id) == "live"
    finally:
        await fleet.turn_off(resource_id)

        async def off() -> bool:
            return await fleet.state(resource_id) == "off"

        await fleet.until(off, "off")


async def test_failing_starts_back_off_and_are_forgiven_when_it_is_turned_on_again(fleet: Fleet) -> None:
    fleet.start_scheduler()
    fleet.start_agent()
    (fleet.behaviour / "fail-start").touch()
    resource_id = await fleet.create_resource(1)
    await fleet.turn_on(resource_id)

    began_s = time.monotonic()

    async def two_failures() -> bool:
        return sum(run[0] == "run" for run in fleet.runs()) == 2

    await fleet.until(two_failures, "two starts")
    assert time.monotonic() - began_s > 2, "no back-off after the first failed start"
    starts = await fleet.database.fetch("SELECT * FROM scheduler.starts ORDER BY ended_at")
    assert starts[0]["reason"] == "exited with status 3"

    async def waits() -> bool:
        reason = await fleet.database.fetchval("SELECT reason FROM scheduler.resources")
        return "2 failed starts in a row (exited with status 3); next start at" in reason

    await fleet.until(waits, "the reason is shown")
    (fleet.behaviour / "fail-start").unlink()
    await fleet.turn_off(resource_id)
    await fleet.turn_on(resource_id)
    await fleet.until(lambda: fleet.is_live(resource_id), "live again")
    place = await fleet.database.fetchrow(
        """SELECT start_attempt, extract(epoch FROM granted_at - (
               SELECT max(decided_at) FROM scheduler.decisions WHERE action = 'turned_on'
           )) AS waited_s FROM scheduler.places"""
    )
    assert place is not None and place["start_attempt"] == 1
    assert place["waited_s"] < 4, "it is started at once, without the back-off of 4 s"
    assert await fleet.database.fetchval("SELECT count(*) FROM scheduler.state_intervals") == 1


async def test_a_frozen_worker_is_lost_keeps_its_place_and_comes_back(fleet: Fleet) -> None:
    fleet.environment["ROUNDHOUSE_LOST_AFTER_S"] = "3"
    fleet.start_scheduler()
    fleet.start_agent()
    resource_id = await live_resource(fleet)
    ((incarnation, pid),) = fleet.workers().items()
    os.kill(pid, signal.SIGSTOP)

    async def lost() -> bool:
        return [p["state"] for p in await fleet.places()] == ["lost"]

    await fleet.until(lost, "the place is lost")
    await asyncio.sleep(1)
    assert list(fleet.workers()) == [incarnation]
    os.kill(pid, signal.SIGCONT)
    await fleet.until(lambda: fleet.is_live(resource_id), "live again")
    intervals = await fleet.database.fetch("SELECT * FROM scheduler.state_intervals ORDER BY started_at")
    assert [row["ended_at"] is None for row in intervals] == [False, True]
    assert (intervals[1]["started_at"] - intervals[0]["ended_at"]).total_seconds() > 2.5
    fleet.assert_no_double()


async def test_commands_are_answered_once_dropped_when_late_and_tell_no_team_of_anothers_resource(
    fleet: Fleet,
) -> None:
    fleet.start_scheduler()
    resource_id = await fleet.create_resource(1)
    first = await fleet.command(TurnOnResource, team_id="team_1", resource_id=resource_id)
    again = await fleet.command(
        TurnOnResource, again=first.command_id, team_id="team_1", resource_id=resource_id
    )
    assert again == first
    other = await fleet.command(TurnOnResource, team_id="team_2", resource_id=resource_id)
    assert (other.ok, other.code) == (False, "not_found")
    unknown = await fleet.command(TurnOnResource, team_id="team_2", resource_id="res_none")
    assert other.message.replace(resource_id, "X") == unknown.message.replace("res_none", "X")

    async def says_why() -> bool:
        return "no free cpu device" in await fleet.database.fetchval("SELECT reason FROM scheduler.resources")

    await fleet.until(says_why, "the reason is shown")
    assert await fleet.state(resource_id) == "starting"
    # A late command is dropped, not run; one for a deleted resource is refused, and its queues are gone.
    late = fleet.make_command(TurnOffResource, late=True, team_id="team_1", resource_id=resource_id)
    await fleet.broker.publish(topology.SCHEDULER_COMMANDS, late)
    await fleet.command(TurnOnResource, team_id="team_1", resource_id=resource_id)
    assert await fleet.database.fetchval("SELECT wanted FROM scheduler.resources") == "on"
    live_queue = topology.job_queue(resource_id, "live")
    await fleet.broker.publish(live_queue, late)
    await fleet.turn_off(resource_id)

    async def deleted() -> bool:
        return (await fleet.command(DeleteResource, team_id="team_1", resource_id=resource_id)).ok

    await fleet.until(deleted, "the resource is deleted")

    async def queue_is_gone() -> bool:
        try:
            await fleet.broker.publish(live_queue, late)
        except Unroutable:
            return True
        return False

    await fleet.until(queue_is_gone, "its queues are deleted")
