"""Pure: how many workers the crowds that came would have been worth.

A crowd that is as short as a start cannot be met by starting workers for it: what can be learned from it is how many the
next one will want. So beside the real queue there is one in thought for each number of workers, which gets all that
arrives, and of which so many workers do what they can. None of them hangs on how many workers there really were.

1. A request is late with so many workers if they had more than `wait_s` of work before it came, done at the utilisation that is
   aimed at.
2. The late ones of each number are counted, and forgotten with a time constant of `forget_s`; so are, slower, all requests.
3. One worker more is worth it if it would have spared at least `least_share` of an hour's requests a late answer. The more
   it would have spared, the longer it stays worth it; but none counts for more than `MOST_WORTH` times as much as it has to,
   so that a long busy time is forgotten as soon after its end as a crowd is.
"""

from __future__ import annotations

import math

from msgspec import Struct

HOUR_S = 3600.0
USUAL_S = 300.0
"""Time constant of the mean of what usually comes."""
LONGEST_WAITS = 2.0
MOST_WORTH = 6.0
"""So a worker is let go after about two time constants (its logarithm, and as the hour's requests are forgotten, too)."""
FORGOTTEN = 0.01
"""Requests that are as good as none."""


class Terms(Struct, frozen=True, kw_only=True):
    """By what is counted."""

    wait_s: float = 10.0
    utilisation: float = 1.0
    least_share: float = 0.015
    forget_s: float = 300.0


TERMS = Terms()


class SeenCrowds(Struct, frozen=True, kw_only=True):
    """What was counted until `at`."""

    at: float
    requests: float
    """Of the last hour; older ones count less."""
    usual_per_s: float
    """Requests, a mean of the last minutes."""
    late: list[float]
    """Of those of the last minutes, with one worker, two, and so on; as long as any were."""


class Worth(Struct, frozen=True):
    workers: int
    late_with_one_less: float


def worth_of(seen: SeenCrowds, least_share: float) -> Worth:
    """How many workers are worth it by rule 3; one if no more are."""
    price = least_share * seen.requests
    late = [*seen.late, 0.0]
    # Late requests and what the workers have to be worth, together, are fewest.
    best = min(range(len(late)), key=lambda index: (late[index] + price * index, index))
    return Worth(best + 1, late[best - 1] if best else 0.0)


class Crowds:
    """Queues in thought, of one worker up to `most`."""

    def __init__(self, most: int, seen: SeenCrowds | None = None) -> None:
        self._most = most
        self._waits_s: list[float] = []
        """Of who comes next, with one worker, two, and so on; with more than these nobody waits."""
        self._requests, self._usual_per_s, self._late = 0.0, 0.0, [0.0] * most
        self._at: float | None = None
        if seen is not None:
            self._requests, self._usual_per_s, self._at = seen.requests, seen.usual_per_s, seen.at
            self._late[: len(seen.late)] = seen.late[:most]

    def pass_time(
        self, requests: float, request_s: float, until: float, passed_s: float, terms: Terms
    ) -> None:
        """So many requests came in the `passed_s` before `until`; each is so much of one worker's work, in full batches.

        Of what would wait for over twice `wait_s` nothing is kept: too few workers for hours of steady work would else be
        behind for hours after its end, as if crowds came all the while.
        """
        self._forget(until, terms.forget_s)
        self._requests += requests
        self._usual_per_s += (requests / passed_s - self._usual_per_s) * (1 - math.exp(-passed_s / USUAL_S))
        work_s = requests * request_s / terms.utilisation
        waits_s: list[float] = []
        for count in range(1, self._most + 1):
            more_s = work_s / count
            before_s = self._waits_s[count - 1] if count <= len(self._waits_s) else 0.0
            behind_s = before_s + more_s - passed_s
            if behind_s <= 0:
                break  # those with more workers have even less before them
            if behind_s > terms.wait_s and more_s > 0:
                self._late[count - 1] += requests * min((behind_s - terms.wait_s) / more_s, 1.0)
            waits_s.append(min(behind_s, LONGEST_WAITS * terms.wait_s))
        self._waits_s = waits_s
        most = MOST_WORTH * terms.least_share * self._requests
        fewer = 0.0
        for index in reversed(range(self._most)):
            fewer = self._late[index] = min(self._late[index], fewer + most)

    def seen(self) -> SeenCrowds | None:
        """None while nothing came."""
        if self._at is None or self._requests < FORGOTTEN:
            return None
        late = [round(each, 3) for each in self._late if each >= FORGOTTEN]  # more workers, fewer late ones
        return SeenCrowds(
            at=self._at,
            requests=round(self._requests, 3),
            usual_per_s=round(self._usual_per_s, 6),
            late=late,
        )

    def _forget(self, until: float, forget_s: float) -> None:
        passed_s = max(until - self._at, 0.0) if self._at is not None else 0.0
        self._at = until
        self._requests *= math.exp(-passed_s / HOUR_S)
        kept = math.exp(-passed_s / forget_s)
        self._late = [each * kept for each in self._late]
