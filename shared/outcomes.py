"""How the taking of a message can end, and the errors that cross module borders.

A consumer's handler returns exactly one outcome; `shared.broker` alone acks. There is no "requeue": on RabbitMQ 3.10
a requeue counts as a failed delivery, so a message that must go back is published again (confirmed), then acked.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Done:
    """The effect is committed (or was found committed already). The message is acked."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """The message is late, stale or for nobody: acked, counted, nothing done."""

    reason: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """The message can never be handled: it goes to the dead-letter queue with the reason, then it is acked."""

    reason: str


@dataclass(frozen=True, slots=True)
class RetryLater:
    """A dependency is away: the same delivery is tried again after a pause, without being given back."""

    reason: str
    after_s: float = 1.0


Outcome = Done | Dropped | Rejected | RetryLater


class Unavailable(Exception):
    """A dependency (broker, database) is away or too slow. Worth another try later."""


class PublishUnknown(Unavailable):
    """No confirm arrived in time: the message may or may not be in the queue. Never treat it as "not sent"."""


class PublishRefused(Exception):
    """The broker answered no: the queue is full (reject-publish)."""


class Unroutable(Exception):
    """The broker has no queue of that name (any more)."""
