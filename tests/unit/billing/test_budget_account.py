"""Rules of budget accounts as tables, and a world of gateways, crashes and late facts that tries to overshoot a cap."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.billing.budget_account import (
    LARGEST_SHARE,
    Account,
    Grant,
    Lease,
    close,
    grant,
    held_nanousd,
    limit_refusal,
    may_write_off,
    settle,
    write_off,
)

HORIZON = 1_000


def lease(granted: int, spent: int | None = None, settled: int = 0, *, written_off: bool = False) -> Lease:
    return Lease(granted, spent, settled, HORIZON, written_off)


@pytest.mark.parametrize(
    ("of", "held"),
    [
        pytest.param(lease(100), 100, id="1 an open lease counts as spent"),
        pytest.param(lease(100, settled=30), 70, id="1, 3 less what is posted of it"),
        pytest.param(lease(100, 60), 60, id="2 a closed one holds what was spent"),
        pytest.param(lease(100, 60, 45), 15, id="2, 3 less what is posted of it"),
        pytest.param(lease(100, 60, 60), 0, id="3 all of it is posted"),
        pytest.param(lease(100, 60, 75), 0, id="3 it never holds less than nothing"),
        pytest.param(lease(100, written_off=True), 0, id="4 a lost one is written off"),
    ],
)
def test_what_a_lease_holds(of: Lease, held: int) -> None:
    assert held_nanousd(of) == held


def test_the_first_close_stands_and_none_says_more_than_was_granted() -> None:
    assert close(lease(100), 40) == lease(100, 40)
    assert close(lease(100, 40), 20) == lease(100, 40)
    assert close(lease(100), 0) == lease(100, 0)
    assert close(lease(100), 100) == lease(100, 100)
    for lie in (-1, 101):
        with pytest.raises(ValueError, match="of a lease of 100"):
            close(lease(100), lie)


def test_each_job_that_is_posted_frees_its_part() -> None:
    assert settle(settle(lease(100), 30), 20) == lease(100, settled=50)


@pytest.mark.parametrize(
    ("of", "read_until", "may"),
    [
        pytest.param(lease(100), HORIZON - 1, False, id="a job of it may still have a fact on the way"),
        pytest.param(lease(100), HORIZON, True, id="none can"),
        pytest.param(lease(100, 60, 20), HORIZON, True, id="closed, but a fact is lost"),
        pytest.param(lease(100, 60, 60), HORIZON, False, id="it holds nothing"),
        pytest.param(lease(100, written_off=True), HORIZON, False, id="it was written off before"),
    ],
)
def test_what_may_be_written_off(of: Lease, read_until: int, may: bool) -> None:
    assert may_write_off(of, read_until) is may


@pytest.mark.parametrize(
    ("account", "needs", "wanted", "unit", "expected"),
    [
        pytest.param(Account(100, 0, 0), [100], 0, 100, Grant(100, (), 100), id="6 the last nano-USD"),
        pytest.param(Account(100, 0, 0), [101], 0, 101, Grant(0, (0,), 100), id="6 one too much"),
        pytest.param(Account(100, 60, 30), [11], 0, 11, Grant(0, (0,), 40), id="6 it waits for others"),
        pytest.param(Account(100, 60, 30), [10, 41], 0, 41, Grant(10, (1,), 40), id="one too large for ever"),
        pytest.param(
            Account(100, 0, 0), [60, 50, 40], 0, 60, Grant(100, (1,), 100), id="6 a smaller one fits"
        ),
        pytest.param(Account(100, 90, 20), [1], 9, 1, Grant(0, (0,), 10), id="5 nothing is free"),
        pytest.param(Account(100, 90, 20), [0], 9, 1, Grant(0, (0,), 10), id="5 less than nothing is free"),
        pytest.param(
            Account(1000, 0, 0), [200], 500, 10, Grant(300, (), 1000), id="7 an eighth of what is left"
        ),
        pytest.param(Account(1000, 0, 0), [200], 50, 10, Grant(250, (), 1000), id="7 no more than is wanted"),
        pytest.param(Account(1000, 0, 0), [200], 500, 100, Grant(300, (), 1000), id="7 just one more"),
        pytest.param(Account(1000, 0, 0), [200], 500, 101, Grant(200, (), 1000), id="7 single requests"),
        pytest.param(Account(1000, 1200, 0), [], 500, 1, Grant(0, (), -200), id="7 overdrawn by minutes"),
        pytest.param(Account(80, 0, 0), [], 500, 10, Grant(10, (), 80), id="7 asked ahead of need"),
        pytest.param(Account(80, 0, 0), [], 0, 0, Grant(0, (), 80), id="7 only to tell of closes"),
    ],
)
def test_what_is_granted(account: Account, needs: list[int], wanted: int, unit: int, expected: Grant) -> None:
    assert grant(account, needs, wanted, unit) == expected


@pytest.mark.parametrize(
    ("limit", "refused"),
    [(100, None), (90, None), (89, "is reserved"), (60, "is reserved"), (59, "more than that was spent")],
)
def test_which_limits_are_refused(limit: int, refused: str | None) -> None:
    said = limit_refusal(Account(1000, 60, 30), limit)
    assert said is None if refused is None else said is not None and refused in said


# ---- a world


@dataclass
class Job:
    lease_no: int
    reserved: int
    fact: int | None = None
    """What it cost, once that was said; None while it runs."""
    posted: bool = False
    lost: bool = False
    """It ended without a fact, and costs nothing."""


@dataclass
class Slice:
    """The truth about one lease: what its gateway knows, beside what billing knows."""

    at_billing: Lease
    left: int
    spent: int = 0
    usable: bool = True
    """Its gateway lives, has not closed it, and it has not expired."""
    closes: list[int] = field(default_factory=list)
    """Told to billing, maybe several times, and on the way."""


class World(RuleBasedStateMachine):
    """Asks, takes, finishes, facts and closes in any order; gateways die; facts come late, but before the horizon."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = 1_000
        self.posted = 0
        self.now = 0
        self.slices: list[Slice] = []
        self.jobs: list[Job] = []

    def account(self) -> Account:
        return Account(self.limit, self.posted, sum(held_nanousd(s.at_billing) for s in self.slices))

    def pick(self, data: st.DataObject, of: list[int]) -> int:
        return data.draw(st.sampled_from(of))

    @rule(
        needs=st.lists(st.integers(1, 400), max_size=4), wanted=st.integers(0, 900), unit=st.integers(1, 300)
    )
    def ask(self, needs: list[int], wanted: int, unit: int) -> None:
        account = self.account()
        given = grant(account, needs, wanted, unit)
        assert given.granted_nanousd <= max(0, account.free_nanousd)
        fitting = sum(need for index, need in enumerate(needs) if index not in given.refused)
        assert fitting <= given.granted_nanousd <= fitting + (account.free_nanousd - fitting) // LARGEST_SHARE
        for index in given.refused:
            before = sum(n for i, n in enumerate(needs[:index]) if i not in given.refused)
            assert needs[index] > account.free_nanousd - before
        lease_of_it = Lease(given.granted_nanousd, None, 0, self.now + 10)
        self.slices.append(Slice(lease_of_it, left=given.granted_nanousd))

    @precondition(lambda self: any(s.usable and s.left for s in self.slices))
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        number = self.pick(data, [n for n, s in enumerate(self.slices) if s.usable and s.left])
        of = self.slices[number]
        amount = data.draw(st.integers(1, of.left))
        of.left -= amount
        of.spent += amount
        self.jobs.append(Job(number, amount))

    @precondition(lambda self: any(j.fact is None and not j.lost for j in self.jobs))
    @rule(data=st.data(), lost=st.booleans())
    def finish(self, data: st.DataObject, lost: bool) -> None:
        job = self.jobs[
            self.pick(data, [n for n, j in enumerate(self.jobs) if j.fact is None and not j.lost])
        ]
        job.lost = lost
        job.fact = None if lost else data.draw(st.integers(0, job.reserved))

    @precondition(lambda self: any(j.fact is not None and not j.posted for j in self.jobs))
    @rule(data=st.data())
    def post(self, data: st.DataObject) -> None:
        job = self.jobs[
            self.pick(data, [n for n, j in enumerate(self.jobs) if j.fact is not None and not j.posted])
        ]
        assert job.fact is not None
        job.posted = True
        self.posted += job.fact
        of = self.slices[job.lease_no]
        of.at_billing = settle(of.at_billing, job.reserved)

    @precondition(lambda self: any(s.usable for s in self.slices))
    @rule(data=st.data(), crash=st.booleans())
    def gateway_ends_a_lease(self, data: st.DataObject, crash: bool) -> None:
        of = self.slices[self.pick(data, [n for n, s in enumerate(self.slices) if s.usable])]
        of.usable = False
        if not crash:
            of.closes.append(of.spent)

    @precondition(lambda self: any(s.closes for s in self.slices))
    @rule(data=st.data())
    def a_close_arrives(self, data: st.DataObject) -> None:
        of = self.slices[self.pick(data, [n for n, s in enumerate(self.slices) if s.closes])]
        of.at_billing = close(of.at_billing, of.closes[0])  # it may come again

    @rule(by=st.integers(1, 4))
    def time_passes(self, by: int) -> None:
        """Nobody takes from a lease, and no job of it runs, at its horizon; facts may be late beyond it."""
        self.now += by
        for number, of in enumerate(self.slices):
            if self.now >= of.at_billing.horizon_unix_ms:
                of.usable = False
                for job in self.jobs:
                    if job.lease_no == number and job.fact is None:
                        job.lost = True

    @rule()
    def let_go_of_lost_leases(self) -> None:
        """All facts published until now are settled: those that are not are of jobs that still ran at that time."""
        unread = [
            self.slices[j.lease_no].at_billing for j in self.jobs if j.fact is not None and not j.posted
        ]
        read_until = min([self.now, *(of.horizon_unix_ms - 1 for of in unread)])
        for of in self.slices:
            if may_write_off(of.at_billing, read_until):
                of.at_billing = write_off(of.at_billing)

    @rule(limit=st.integers(0, 3_000))
    def set_limit(self, limit: int) -> None:
        account = self.account()
        if limit_refusal(account, limit) is None:
            self.limit = limit
        else:
            assert limit < account.posted_nanousd + account.held_nanousd

    @invariant()
    def no_overshoot(self) -> None:
        account = self.account()
        assert account.posted_nanousd + account.held_nanousd <= self.limit

    @invariant()
    def a_lease_holds_what_may_still_be_posted_of_it(self) -> None:
        for number, of in enumerate(self.slices):
            unposted = sum(
                j.reserved for j in self.jobs if j.lease_no == number and not j.posted and not j.lost
            )
            may_be_taken = of.left if of.usable else 0
            assert held_nanousd(of.at_billing) >= unposted + may_be_taken

    def teardown(self) -> None:
        """Everything is let go in the end: nothing leaks."""
        self.time_passes(100)
        for job in self.jobs:
            if job.fact is not None and not job.posted:
                job.posted = True
                self.posted += job.fact
                of = self.slices[job.lease_no]
                of.at_billing = settle(of.at_billing, job.reserved)
        self.let_go_of_lost_leases()
        assert self.account().held_nanousd == 0


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


def test_minutes_are_posted_whatever_the_limit_and_nothing_is_granted_then() -> None:
    overdrawn = Account(100, 130, 0)
    assert overdrawn.free_nanousd == -30
    assert grant(overdrawn, [1], 8, 1) == Grant(0, (0,), -30)
