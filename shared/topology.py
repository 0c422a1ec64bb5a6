"""The broker's exchanges and queues as frozen values: the only place that names or declares one.

Works unchanged on RabbitMQ 3.10 and 4.x, therefore: quorum queues always with an explicit delivery limit (4.x has a
default of 20, 3.10 none), no priorities, no transient shared queues, no global QoS. A queue's arguments can never be
changed, so names carry a version: other arguments mean a new version.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

POOL_SHARDS = 8
"""Live queues of a shared pool; teams are spread over them by hash, workers serve them by deficit round robin."""

EVENTS_EXCHANGE = "events.v1"
DEAD_QUEUE = "dead.v1"
NO_DELIVERY_LIMIT = 1_000_000_000
"""None, in effect. Unsaid 4.x has one of 20, and 3.10 takes -1, which is none in 4.x, for none at all: it drops what comes back
once."""


@dataclass(frozen=True, slots=True)
class Queue:
    """One queue: its name, its arguments, and the keys that bind it to the events exchange."""

    name: str
    arguments: Mapping[str, str | int]
    bindings: tuple[str, ...] = field(default=())


def _quorum(name: str, *, max_length: int, max_bytes: int, bindings: tuple[str, ...] = ()) -> Queue:
    # at-least-once dead-lettering needs reject-publish: the two belong together.
    arguments: dict[str, str | int] = {
        "x-queue-type": "quorum",
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": DEAD_QUEUE,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
        "x-delivery-limit": 20,
        "x-max-length": max_length,
        "x-max-length-bytes": max_bytes,
    }
    return Queue(name, arguments, bindings)


def _classic(
    name: str, *, ttl_ms: int, max_length: int, expires_ms: int | None = None, bindings: tuple[str, ...] = ()
) -> Queue:
    arguments: dict[str, str | int] = {
        "x-queue-type": "classic",
        "x-message-ttl": ttl_ms,
        "x-max-length": max_length,
        "x-overflow": "drop-head",
    }
    if expires_ms is not None:
        arguments["x-expires"] = expires_ms
    return Queue(name, arguments, bindings)


def job_queue(resource_id: str, work_class: str, shard: int | None = None) -> Queue:
    """Work for one resource. `shard` is set only for the live queues of a shared pool."""
    name = f"jobs.v1.{resource_id}.{work_class}" + ("" if shard is None else f".{shard}")
    return _quorum(name, max_length=20_000, max_bytes=512 * 1024 * 1024)


def job_queues(resource_id: str, *, pool: bool) -> list[Queue]:
    """All job queues of a resource: one live and one batch queue; eight live ones on a shared pool."""
    shards: list[int | None] = list(range(POOL_SHARDS)) if pool else [None]
    return [job_queue(resource_id, "live", shard) for shard in shards] + [job_queue(resource_id, "batch")]


def batch_queue_for(resource_id: str) -> Queue:
    """The queue that lines of batches go to; whose line is next was decided before."""
    return job_queue(resource_id, "batch")


def live_queue_for(resource_id: str, team_id: str, *, pool: bool) -> Queue:
    """The live queue that this team's jobs go to."""
    if not pool:
        return job_queue(resource_id, "live")
    return job_queue(resource_id, "live", hashlib.sha256(team_id.encode()).digest()[0] % POOL_SHARDS)


def reply_queue(owner_id: str) -> Queue:
    """Claims, deltas and results for one owner (gateway or batch instance). Expires 20 s after its consumer left."""
    return _classic(f"replies.v1.{owner_id}", ttl_ms=60_000, max_length=50_000, expires_ms=20_000)


def worker_commands(worker_id: str) -> Queue:
    """Grants, cancels and drains for one worker."""
    return _classic(f"commands.v1.worker.{worker_id}", ttl_ms=60_000, max_length=10_000, expires_ms=20_000)


def node_commands(node_id: str) -> Queue:
    """Starts and stops for one node agent; outlives a restart of the agent."""
    return _classic(f"commands.v1.node.{node_id}", ttl_ms=30_000, max_length=10_000, expires_ms=3_600_000)


def scheduler_events(instance_id: str) -> Queue:
    """Reports of nodes and workers for one scheduler. Each instance has its own queue: on a shared one they would be
    dealt out between leader and standby, and a frozen leader would keep half of them from its successor."""
    return _classic(
        f"events.v1.scheduler.{instance_id}",
        ttl_ms=30_000,
        max_length=10_000,
        expires_ms=20_000,
        bindings=("node.report.v1", "worker.report.v1"),
    )


SCHEDULER_COMMANDS = _classic("commands.v1.scheduler", ttl_ms=30_000, max_length=10_000)
BILLING_COMMANDS = _classic("commands.v1.billing", ttl_ms=30_000, max_length=10_000)
BATCH_COMMANDS = _classic("commands.v1.batch", ttl_ms=30_000, max_length=10_000)
# Requests wait for the answers, two seconds at most: these never stand behind a command that takes its time.
BILLING_BUDGETS = _classic("commands.v1.billing-budgets", ttl_ms=5_000, max_length=10_000)
BILLING_EVENTS = _quorum(
    "events.v1.billing",
    max_length=5_000_000,
    max_bytes=8 * 1024 * 1024 * 1024,
    bindings=("usage.job_finished.v1", "usage.job_voided.v1", "payment.reported.v1"),
)
ALARMS = _quorum(
    "events.v1.alarms",
    max_length=10_000,
    max_bytes=64 * 1024 * 1024,
    bindings=("worker.model_damaged.v1",),
)
# A dead-letter queue has no dead-letter route, so a limit would drop from it.
DEAD = Queue(
    DEAD_QUEUE,
    {
        "x-queue-type": "quorum",
        "x-delivery-limit": NO_DELIVERY_LIMIT,
        "x-max-length": 100_000,
        "x-overflow": "reject-publish",
    },
)

STATIC_QUEUES = (
    DEAD,
    SCHEDULER_COMMANDS,
    BILLING_COMMANDS,
    BILLING_BUDGETS,
    BATCH_COMMANDS,
    BILLING_EVENTS,
    ALARMS,
)
"""Declared by every service at start, so that their order of start does not matter."""


# ---- the vhost of the teams: who submits batches over AMQP has a user there, and rights on these names alone

TEAMS_VHOST = "roundhouse-teams"
"""Its usual name; a broker that several installations share needs others."""
TEAM_TAG = re.compile(r"[0-9a-f]{24}")
TEAM_REFUSALS_TTL_MS = 24 * 3600 * 1000
TEAM_MAX_CONNECTIONS = 8
TEAM_MAX_CHANNELS = 32
"""Of one user, over all its connections."""
TEAMS_MAX_CONNECTIONS = 4000
"""Of the whole vhost."""


@dataclass(frozen=True, slots=True)
class Rights:
    """What a user may do in a vhost: patterns of names, as RabbitMQ has them."""

    configure: str
    write: str
    read: str


@dataclass(frozen=True, slots=True)
class TeamNames:
    """What one team has in the teams' vhost. `tag` is random: whoever knows a name may ask the broker how much waits
    there (RabbitMQ lets everybody declare passively), so that names must not be guessable, nor be known as ids are."""

    tag: str

    def __post_init__(self) -> None:
        if not TEAM_TAG.fullmatch(self.tag):  # it stands in patterns of rights
            raise ValueError("a team's tag is 24 hex digits")

    @property
    def submit_exchange(self) -> str:
        """Where the team publishes. A fanout: routing keys, also those in a message's headers, lead nowhere else."""
        return f"submit.v2.{self.tag}"

    @property
    def submissions(self) -> Queue:
        """What waits for the batch service, which alone reads it. Full: the broker answers publishers no."""
        arguments: dict[str, str | int] = {
            "x-queue-type": "quorum",
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": self.refusals.name,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
            "x-delivery-limit": 20,
            "x-max-length": 10_000,
            "x-max-length-bytes": 64 * 1024 * 1024,
        }
        return Queue(f"submissions.v2.{self.tag}", arguments)

    @property
    def refusals(self) -> Queue:
        """Refusals of messages that named no reply queue of the team's, and messages that expired, as they were published."""
        arguments: dict[str, str | int] = {
            "x-queue-type": "classic",
            "x-message-ttl": TEAM_REFUSALS_TTL_MS,
            "x-max-length": 1000,
            "x-max-length-bytes": 32 * 1024 * 1024,
            "x-overflow": "drop-head",
        }
        return Queue(f"refused.v2.{self.tag}", arguments)

    def replies(self, name: str) -> Queue:
        """Answers and results for one user of the team. Full: results wait in the database."""
        arguments: dict[str, str | int] = {
            "x-queue-type": "quorum",
            "x-overflow": "reject-publish",
            "x-delivery-limit": NO_DELIVERY_LIMIT,  # a client may die with its answers again and again
            "x-max-length": 100_000,
            "x-max-length-bytes": 256 * 1024 * 1024,
        }
        return Queue(f"reply.v2.{self.tag}.{name}", arguments)

    def queues(self, names: Iterable[str]) -> list[Queue]:
        """All of the team's queues, for users of these names."""
        return [self.submissions, self.refusals, *(self.replies(name) for name in names)]

    def rights(self, name: str) -> Rights:
        """What the user of this name may do: publish to the exchange, read its replies and the refusals; declare nothing."""
        read = "|".join(re.escape(queue.name) for queue in (self.replies(name), self.refusals))
        return Rights("^$", f"^{re.escape(self.submit_exchange)}$", f"^({read})$")
