"""Pure: the slices of budgets that this gateway may spend in memory, and what it asks billing for.

A slice is of one budget in one period. Rules:

1. A request takes its worst case from the running lease, if that is still valid and has as much left.
2. Otherwise it waits, and the lease is wound up: what it has left goes back with the next ask.
3. One ask is out at a time, for all that wait by then; it is sent again every `RESEND_S`, and given up after `ASK_S`: then
   whoever waited for it is told that billing is silent, and the lease that it may have made is closed unused.
4. Its answer serves who waited for it, first come first; who does not fit is refused. Then whoever came meanwhile, as far
   as it goes.
5. A lease is valid from when its ask was first sent, not from when the answer came: so it ends here before it does
   at billing.
6. A lease is closed when nothing more is taken from it and the fate of each job that was reserved from it is known:
   published, or given back. The close is repeated until billing confirms it.
7. While billing gives more than is needed, the next lease is asked for ahead: when a quarter is left, or when the time
   is nearly over and it was used. It is meant to last `AHEAD_MS` at the pace of this one.
8. What was refused because the budget is spent up is refused again for `DENIED_S` without asking: whoever hammers at a
   spent budget loads nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date

RESEND_S = 0.5
ASK_S = 2.0
AHEAD_MS = 10_000
SHORTEST_MS = 100
"""A lease that was used up at once says nothing of the pace."""
NEARLY_OVER_S = 2.0
DENIED_S = 1.0
MAX_NEEDS = 256
MAX_CLOSES = 256


@dataclass(frozen=True, slots=True)
class SliceKey:
    """One budget in one period."""

    budget_id: str
    period_start: date


@dataclass(frozen=True, slots=True)
class Ask:
    """To be sent to billing now."""

    lease_id: str
    needs_nanousd: tuple[int, ...]
    wanted_nanousd: int
    unit_nanousd: int
    closed: tuple[tuple[str, int], ...]
    """(lease id, spent) of leases to close."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What billing said to an ask."""

    lease_id: str
    granted_nanousd: int
    valid_s: float
    refused: Sequence[int]
    unposted_nanousd: int
    closed: Sequence[str]


@dataclass(frozen=True, slots=True)
class Taken:
    """The waiter has its worst case, from this lease."""

    waiter: str
    lease_id: str
    amount: int


@dataclass(frozen=True, slots=True)
class Denied:
    """The waiter does not fit. spent_up: nor would it if no other request ran."""

    waiter: str
    spent_up: bool


@dataclass(frozen=True, slots=True)
class Unanswered:
    """Billing was silent."""

    waiter: str


Outcome = Taken | Denied | Unanswered


@dataclass(slots=True)
class _Lease:
    granted: int
    left: int
    expires_s: float
    began_s: float
    roomy: bool
    """More than was needed: there is no need to count single requests."""
    in_doubt: int = 0
    """Takes whose jobs are neither published nor given back."""

    @property
    def spent(self) -> int:
        return self.granted - self.left


@dataclass(slots=True)
class _Out:
    """An ask that is not answered yet."""

    ask: Ask
    waiters: tuple[str, ...]
    first_sent_s: float
    sent_s: float


@dataclass(slots=True)
class Slice:
    """What this gateway has of one budget and period."""

    new_lease_id: Callable[[], str]
    _current: str | None = None
    _leases: dict[str, _Lease] = field(default_factory=dict)
    """The running one and those that are wound up."""
    _closing: dict[str, int] = field(default_factory=dict)
    _closes_sent_s: float = float("-inf")
    _waiting: dict[str, int] = field(default_factory=dict)
    _out: _Out | None = None
    _unit: int = 0
    _denied: int = 0
    """The smallest amount that was just refused for good."""
    _denied_until_s: float = float("-inf")

    def is_denied(self, amount: int, now_s: float) -> bool:
        """Whether it is known that so much does not fit."""
        return now_s < self._denied_until_s and amount >= self._denied  # 8

    def take(self, amount: int, now_s: float) -> str | None:
        """Take from the running lease; return its id, or None if that does not go."""
        lease = self._running(now_s)
        if lease is None or lease.left < amount or self._current is None:
            return None
        lease.left -= amount  # 1
        lease.in_doubt += 1
        self._unit = amount
        return self._current

    def wait(self, waiter: str, amount: int) -> None:
        """Queue for the next ask."""
        self._waiting[waiter] = amount  # 2
        self._unit = amount

    def forget(self, waiter: str) -> None:
        """The waiter has gone."""
        self._waiting.pop(waiter, None)

    def resolve(self, lease_id: str, unused: int) -> None:
        """All jobs of a take are published (their facts will free it) but for this much, which will certainly not run."""
        if (lease := self._leases.get(lease_id)) is not None:
            lease.in_doubt -= 1
            lease.left += unused
            self._close_if_done(lease_id)

    def tick(self, now_s: float) -> tuple[Ask | None, list[Outcome]]:
        """What to send now, and who waits in vain. Called after a `wait`, and a few times a second."""
        self._running(now_s)
        outcomes = self._give_up(now_s)
        out = self._out
        if out is not None:
            if now_s - out.sent_s < RESEND_S:
                return None, outcomes
            out.sent_s = now_s  # 3
            return out.ask, outcomes
        ask = self._next_ask(now_s)
        if ask is not None and (ask.needs_nanousd or ask.wanted_nanousd):
            self._out = _Out(ask, tuple(self._waiting)[: len(ask.needs_nanousd)], now_s, now_s)
        return ask, outcomes

    def on_answer(self, answer: Answer, now_s: float) -> list[Outcome]:
        """Take what billing gave, and serve who waited for it."""
        for lease_id in answer.closed:
            self._closing.pop(lease_id, None)
        out = self._out
        if out is None or out.ask.lease_id != answer.lease_id:
            return []
        self._out = None
        self._wind_up()
        if granted := answer.granted_nanousd:
            expires_s = out.first_sent_s + answer.valid_s  # 5
            roomy = granted > sum(out.ask.needs_nanousd)
            self._leases[answer.lease_id] = _Lease(granted, granted, expires_s, now_s, roomy)
            self._current = answer.lease_id
        return self._serve(out, answer, now_s)  # 4

    def drain(self) -> None:
        """Nothing is taken any more: close what can be closed."""
        self._wind_up()
        self._denied_until_s = float("-inf")

    def is_idle(self, now_s: float) -> bool:
        """Nothing is held, asked, to be told or to be remembered: it may be forgotten."""
        busy = self._leases or self._closing or self._waiting or self._out
        return not busy and now_s >= self._denied_until_s

    def _serve(self, out: _Out, answer: Answer, now_s: float) -> list[Outcome]:
        refused = set(answer.refused)
        outcomes: list[Outcome] = []
        for index, waiter in enumerate(out.waiters):
            if waiter not in self._waiting:
                continue
            amount = self._waiting[waiter]
            if index in refused:
                spent_up = amount > answer.unposted_nanousd
                outcomes.append(Denied(waiter, spent_up))
                if spent_up:
                    self._deny(amount, now_s)
                del self._waiting[waiter]
            elif (lease_id := self.take(amount, now_s)) is not None:
                outcomes.append(Taken(waiter, lease_id, amount))
                del self._waiting[waiter]
        for waiter, amount in list(self._waiting.items()):
            if (lease_id := self.take(amount, now_s)) is not None:
                outcomes.append(Taken(waiter, lease_id, amount))
                del self._waiting[waiter]
        return outcomes

    def _deny(self, amount: int, now_s: float) -> None:
        self._denied = min(amount, self._denied) if now_s < self._denied_until_s else amount
        self._denied_until_s = now_s + DENIED_S

    def _running(self, now_s: float) -> _Lease | None:
        if self._current is None:
            return None
        lease = self._leases[self._current]
        if now_s >= lease.expires_s:  # 5
            self._wind_up()
            return None
        return lease

    def _wind_up(self) -> None:
        if (lease_id := self._current) is not None:
            self._current = None
            self._close_if_done(lease_id)

    def _close_if_done(self, lease_id: str) -> None:
        if lease_id != self._current and self._leases[lease_id].in_doubt == 0:  # 6
            self._closing[lease_id] = self._leases.pop(lease_id).spent

    def _give_up(self, now_s: float) -> list[Outcome]:
        out = self._out
        if out is None or now_s - out.first_sent_s < ASK_S:
            return []
        self._out = None  # 3
        self._closing[out.ask.lease_id] = 0
        gone = [waiter for waiter in out.waiters if self._waiting.pop(waiter, None) is not None]
        return [Unanswered(waiter) for waiter in gone]

    def _next_ask(self, now_s: float) -> Ask | None:
        wanted = self._wanted(now_s)
        needs = tuple(self._waiting.values())[:MAX_NEEDS]
        if needs:
            self._wind_up()  # 2
        closes_due = self._closing and now_s - self._closes_sent_s >= RESEND_S
        if not (needs or wanted or closes_due):
            return None
        self._closes_sent_s = now_s
        closed = tuple(self._closing.items())[:MAX_CLOSES]
        return Ask(self.new_lease_id(), needs, wanted, max((self._unit, *needs)), closed)

    def _wanted(self, now_s: float) -> int:
        """Beside who waits: for requests to come. 0 while there is no need to ask."""
        lease = self._leases[self._current] if self._current is not None else None
        if lease is None:
            return 8 * self._unit if self._waiting else 0
        low = lease.left * 4 <= lease.granted
        nearly_over = lease.expires_s - now_s <= NEARLY_OVER_S
        if not self._waiting and not (lease.roomy and lease.spent and (low or nearly_over)):  # 7
            return 0
        since_ms = max(int((now_s - lease.began_s) * 1000), SHORTEST_MS)
        return max(self._unit, lease.spent * AHEAD_MS // since_ms)
