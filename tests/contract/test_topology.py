"""The broker's topology: every queue is bounded, says what happens at the bound, and somebody reads it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from shared import messages, topology
from shared.broker import Broker
from shared.outcomes import Unavailable
from shared.teams_broker import TeamsBroker
from shared.topology import Queue
from tests.conftest import Vhost
from tests.contract.test_messages import TYPES

SERVICES = Path(__file__).resolve().parents[2] / "services"

QUEUES: dict[str, Queue] = {
    queue.name: queue
    for queue in (
        *topology.STATIC_QUEUES,
        *topology.job_queues("res_1", pool=False),
        *topology.job_queues("res_2", pool=True),
        topology.reply_queue("gw_1"),
        topology.worker_commands("wrk_1"),
        topology.node_commands("node_1"),
        topology.scheduler_events("sch_1"),
    )
}

KNOWN_ARGUMENTS = {
    "x-queue-type",
    "x-dead-letter-exchange",
    "x-dead-letter-routing-key",
    "x-dead-letter-strategy",
    "x-overflow",
    "x-delivery-limit",
    "x-max-length",
    "x-max-length-bytes",
    "x-message-ttl",
    "x-expires",
}
"""All others are refused by 3.10 (x-max-priority, x-queue-mode on quorum queues), ignored without a word by it
(x-consumer-timeout, misspelt ones), or refused by 4.x: what was not tried on both does not belong here."""

# The constant or maker of each queue, and the service that reads it.
READERS = {
    "DEAD": "scheduler",
    "SCHEDULER_COMMANDS": "scheduler",
    "scheduler_events": "scheduler",
    "ALARMS": "scheduler",
    "BILLING_COMMANDS": "billing",
    "BILLING_BUDGETS": "billing",
    "BILLING_EVENTS": "billing",
    "BATCH_COMMANDS": "batch",
    "job_queues": "worker",
    "worker_commands": "worker",
    "node_commands": "worker/agent",
    "reply_queue": "gateway",
}

quorum = pytest.mark.parametrize(
    "queue", [q for q in QUEUES.values() if q.arguments["x-queue-type"] == "quorum"], ids=lambda q: q.name
)
classic = pytest.mark.parametrize(
    "queue", [q for q in QUEUES.values() if q.arguments["x-queue-type"] == "classic"], ids=lambda q: q.name
)
every = pytest.mark.parametrize("queue", QUEUES.values(), ids=lambda q: q.name)


@every
def test_a_queue_is_bounded_and_says_what_happens_at_the_bound(queue: Queue) -> None:
    assert int(queue.arguments["x-max-length"]) > 0
    assert queue.arguments["x-overflow"] in ("reject-publish", "drop-head")
    assert queue.arguments["x-queue-type"] in ("quorum", "classic")


@every
def test_a_queue_has_only_arguments_that_all_brokers_understand(queue: Queue) -> None:
    assert set(queue.arguments) <= KNOWN_ARGUMENTS


@every
def test_a_name_carries_its_version(queue: Queue) -> None:
    assert re.fullmatch(r"[a-z]+\.v[1-9][0-9]*(\.[a-zA-Z0-9_-]+)*", queue.name)
    assert len(queue.name.encode()) <= 255


@every
def test_a_classic_queue_has_no_delivery_limit_and_a_quorum_queue_drops_nothing_at_its_bound(
    queue: Queue,
) -> None:
    if queue.arguments["x-queue-type"] == "classic":
        assert "x-delivery-limit" not in queue.arguments  # 406 on every version
    else:
        assert queue.arguments["x-overflow"] == "reject-publish"


@quorum
def test_a_quorum_queue_states_its_delivery_limit(queue: Queue) -> None:
    # 4.x has a default of 20 and 3.10 none: unsaid, the two would differ. -1 is no limit for the one, 0 for the other.
    limit = int(queue.arguments["x-delivery-limit"])
    assert limit >= (topology.NO_DELIVERY_LIMIT if queue.name == topology.DEAD_QUEUE else 1)


@quorum
def test_a_quorum_queue_has_a_dead_letter_route(queue: Queue) -> None:
    if queue.name == topology.DEAD_QUEUE:
        assert "x-dead-letter-exchange" not in queue.arguments  # it would feed itself
        return
    assert queue.arguments["x-dead-letter-exchange"] == ""
    assert queue.arguments["x-dead-letter-routing-key"] in {q.name for q in topology.STATIC_QUEUES}
    assert queue.arguments["x-dead-letter-strategy"] == "at-least-once"
    assert (
        queue.arguments["x-overflow"] == "reject-publish"
    )  # without it the strategy falls back to at-most-once


@quorum
def test_a_work_queue_is_bounded_in_bytes_too(queue: Queue) -> None:
    if queue.name != topology.DEAD_QUEUE:
        assert int(queue.arguments["x-max-length-bytes"]) >= 8 * messages.MAX_MESSAGE_BYTES


@classic
def test_what_a_classic_queue_holds_ends_by_itself(queue: Queue) -> None:
    assert 0 < int(queue.arguments["x-message-ttl"]) <= 60_000


@classic
def test_a_queue_that_belongs_to_one_process_goes_away_with_it(queue: Queue) -> None:
    is_static = queue in topology.STATIC_QUEUES
    assert ("x-expires" in queue.arguments) is not is_static


def test_names_never_meet() -> None:
    made = [
        *topology.STATIC_QUEUES,
        *topology.job_queues("a", pool=False),
        *topology.job_queues("b", pool=True),
        *(make("a") for make in _MAKERS),
        *(make("b") for make in _MAKERS),
    ]
    assert len({queue.name for queue in made}) == len(made)


_MAKERS = (
    topology.reply_queue,
    topology.worker_commands,
    topology.node_commands,
    topology.scheduler_events,
)


def test_a_binding_is_the_type_of_a_message() -> None:
    tags = {str(kind.__struct_config__.tag) for kind in TYPES}
    assert {key for queue in QUEUES.values() for key in queue.bindings} <= tags


def test_every_fact_about_money_reaches_billing() -> None:
    facts = {
        str(kind.__struct_config__.tag)
        for kind in (messages.JobUsage, messages.JobVoided, messages.PaymentReported)
    }
    assert set(topology.BILLING_EVENTS.bindings) == facts


def test_every_report_of_the_fleet_reaches_the_scheduler() -> None:
    facts = {str(kind.__struct_config__.tag) for kind in (messages.NodeReport, messages.WorkerReport)}
    assert set(topology.scheduler_events("s").bindings) == facts


def test_a_team_keeps_its_queue_in_a_pool() -> None:
    teams = [f"team_{number}" for number in range(400)]
    first = [topology.live_queue_for("pool", team, pool=True) for team in teams]
    assert [topology.live_queue_for("pool", team, pool=True) for team in teams] == first
    declared = {queue.name for queue in topology.job_queues("pool", pool=True)}
    used = {queue.name for queue in first}
    assert used == declared - {topology.job_queue("pool", "batch").name}, "every shard is used, and declared"


def test_the_shard_of_a_team_is_the_same_in_every_version_of_the_program() -> None:
    # Gateways of two versions meet during an upgrade: a team on two shards would get two shares of the pool.
    shards = [topology.live_queue_for("p", team, pool=True).name for team in ("team_a", "team_b", "team_c")]
    assert shards == ["jobs.v1.p.live.1", "jobs.v1.p.live.2", "jobs.v1.p.live.5"]


def test_a_dedicated_resource_has_one_live_queue_for_all_keys_of_its_team() -> None:
    assert topology.live_queue_for("res", "team_a", pool=False) == topology.job_queue("res", "live")
    assert len(topology.job_queues("res", pool=False)) == 2


@pytest.mark.parametrize(("name", "service"), READERS.items())
def test_a_queue_has_a_consumer(name: str, service: str) -> None:
    consuming = [
        path
        for path in (SERVICES / service).rglob("*.py")
        if name in _topology_names(path) and {"consume", "subscribe"} & _attributes(path)
    ]
    assert consuming, f"no module of services/{service} takes topology.{name} and consumes or subscribes"


def test_the_table_of_readers_is_complete() -> None:
    static = {
        name for name, value in vars(topology).items() if isinstance(value, Queue)
    }  # makers are functions that return a Queue
    makers = {make.__name__ for make in _MAKERS} | {"job_queues"}
    assert static | makers == set(READERS)


_QUEUE_NAME = r"(jobs|replies|commands|events|dead|submit|submissions|reply|refused)\.v\d"


def test_only_the_topology_spells_a_queue() -> None:
    spelled = []
    for path in sorted(SERVICES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and re.match(_QUEUE_NAME, str(node.value)):
                spelled.append(f"{path.relative_to(SERVICES)}:{node.lineno}: {node.value!r}")
    assert spelled == []


def _topology_names(path: Path) -> set[str]:
    """Names that the file takes from `shared.topology`."""

    def names() -> Iterator[str]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "topology":
                    yield node.attr
            elif isinstance(node, ast.ImportFrom) and node.module == "shared.topology":
                yield from (alias.name for alias in node.names)

    return set(names())


def _attributes(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


# ---- on a real broker


async def test_every_queue_is_accepted_by_the_broker_and_may_be_declared_again(vhost: Vhost) -> None:
    async with AsyncExitStack() as stack:
        first = await Broker.open(vhost.amqp_url, "first", stack)  # declares the static ones
        await first.declare(QUEUES.values())
        second = await Broker.open(vhost.amqp_url, "second", stack)
        await second.declare(QUEUES.values())
        assert [await second.depth(queue) for queue in QUEUES.values()] == [0] * len(QUEUES)


async def test_other_arguments_under_a_name_are_refused(vhost: Vhost) -> None:
    longer = dict(topology.ALARMS.arguments) | {"x-max-length": 200_000}
    async with AsyncExitStack() as stack:
        broker = await Broker.open(vhost.amqp_url, "test", stack)
        with pytest.raises(Exception, match="inequivalent arg 'x-max-length'") as refused:
            await broker.declare([replace(topology.ALARMS, arguments=longer)])
        assert not isinstance(refused.value, Unavailable), "waiting would not mend it: the start has to fail"


# ---- the teams' vhost

TEAM = topology.TeamNames("0123456789abcdef01234567")
TEAM_QUEUES = {queue.name: queue for queue in TEAM.queues(["nightly", "by-day"])}


@pytest.mark.parametrize("queue", TEAM_QUEUES.values(), ids=lambda q: q.name)
def test_a_team_s_queue_is_bounded_and_loses_nothing_that_was_accepted(queue: Queue) -> None:
    assert set(queue.arguments) <= KNOWN_ARGUMENTS
    assert int(queue.arguments["x-max-length"]) > 0
    if queue == TEAM.refusals:
        assert int(queue.arguments["x-message-ttl"]) > 0 and queue.arguments["x-overflow"] == "drop-head"
        return
    assert queue.arguments["x-queue-type"] == "quorum" and queue.arguments["x-overflow"] == "reject-publish"
    assert int(queue.arguments["x-max-length-bytes"]) > 0
    if queue == TEAM.submissions:
        assert queue.arguments["x-dead-letter-routing-key"] == TEAM.refusals.name
        assert int(queue.arguments["x-delivery-limit"]) >= 1
    else:  # a client that dies again and again is no reason to drop a result
        assert int(queue.arguments["x-delivery-limit"]) > 1_000_000


def test_rights_match_the_user_s_own_names_and_nothing_like_them() -> None:
    rights = TEAM.rights("nightly")
    other = topology.TeamNames("f" * 24)
    own = {TEAM.submit_exchange}, {TEAM.replies("nightly").name, TEAM.refusals.name}
    names = [
        *TEAM_QUEUES,
        *(q.name for q in other.queues(["nightly"])),
        other.submit_exchange,
        TEAM.submit_exchange,
    ]
    names += [name + tail for name in (*own[0], *own[1]) for tail in ("", "x", ".x", "\n")]
    names += [name.replace(".", "x") for name in (*own[0], *own[1])] + [
        "amq.default",
        "amq.topic",
        "dead.v1",
        "",
    ]
    assert {name for name in names if re.search(rights.write, name) and not name.endswith("\n")} == own[0]
    assert {name for name in names if re.search(rights.read, name) and not name.endswith("\n")} == own[1]
    assert not any(re.search(rights.configure, name) for name in names if name)


@pytest.mark.parametrize("tag", ["", ".*", "0123456789ABCDEF01234567", "0" * 23, "0" * 25, "0" * 24 + "\n"])
def test_a_tag_is_nothing_but_hex_digits(tag: str) -> None:
    with pytest.raises(ValueError, match="24 hex"):
        topology.TeamNames(tag)


async def test_a_team_s_queues_are_accepted_by_the_broker_and_may_be_declared_again(vhost: Vhost) -> None:
    async with AsyncExitStack() as stack:
        broker = await TeamsBroker.open(vhost.amqp_url, "test", stack)
        await broker.declare(TEAM, ["nightly", "by-day"])
        await broker.declare(TEAM, ["nightly"])
