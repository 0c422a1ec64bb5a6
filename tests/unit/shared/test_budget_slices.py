"""Slices rule by rule, and a world in which messages between gateways and billing are lost, doubled and late."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.billing.budget_account import Account, Lease, close, grant, held_nanousd, settle
from shared.budgets.slices import (
    AHEAD_MS,
    ASK_S,
    DENIED_S,
    MAX_NEEDS,
    NEARLY_OVER_S,
    RESEND_S,
    Answer,
    Ask,
    Denied,
    Slice,
    Taken,
    Unanswered,
)

VALID_S = 10.0
START_S = 1_000.0


def make_slice() -> Slice:
    numbers = itertools.count(1)
    return Slice(lambda: f"lease_{next(numbers)}")


def asked(of: Slice, now_s: float = START_S) -> Ask:
    ask, outcomes = of.tick(now_s)
    assert ask is not None and outcomes == []
    return ask


def granted(ask: Ask, amount: int, refused: tuple[int, ...] = (), unposted: int = 10_000) -> Answer:
    return Answer(ask.lease_id, amount, VALID_S, refused, unposted, [lease_id for lease_id, _ in ask.closed])


def with_lease(amount: int, need: int = 10) -> Slice:
    """A slice that was asked for at `START_S`; its first request has its need."""
    of = make_slice()
    of.wait("first", need)
    assert of.on_answer(granted(asked(of), amount), START_S) == [Taken("first", "lease_1", need)]
    of.resolve("lease_1", 0)
    return of


def test_an_empty_slice_asks_for_who_waits_and_for_some_more() -> None:
    of = make_slice()
    assert of.take(10, START_S) is None
    of.wait("a", 30)
    of.wait("b", 10)
    assert asked(of) == Ask("lease_1", (30, 10), 80, 30, ())
    assert of.tick(START_S + 0.1) == (None, [])


def test_a_request_takes_from_the_running_lease() -> None:  # 1
    of = with_lease(100)
    assert of.take(90, START_S + 1) == "lease_1"
    assert of.take(1, START_S + 1) is None


def test_who_does_not_fit_waits_and_the_rest_goes_back() -> None:  # 2
    of = with_lease(100)
    assert of.take(91, START_S + 1) is None
    of.wait("b", 91)
    assert asked(of, START_S + 1).closed == (("lease_1", 10),)


def test_an_ask_is_repeated_and_then_given_up() -> None:  # 3
    of = make_slice()
    of.wait("a", 10)
    first = asked(of)
    of.wait("b", 20)
    assert of.tick(START_S + RESEND_S - 0.01) == (None, [])
    assert of.tick(START_S + RESEND_S) == (first, [])
    assert of.tick(START_S + RESEND_S + 0.1) == (None, [])
    ask, outcomes = of.tick(START_S + ASK_S)
    assert outcomes == [Unanswered("a")]
    assert ask is not None and ask.needs_nanousd == (20,)
    assert ask.closed == (("lease_1", 0),), "should it have made a lease, nobody uses it"
    assert of.on_answer(granted(first, 100), START_S + ASK_S) == [], "too late"
    assert of.take(1, START_S + ASK_S) is None


def test_an_answer_serves_who_waited_before_anybody_else() -> None:  # 4
    of = make_slice()
    for waiter, amount in (("gone", 5), ("a", 60), ("b", 50), ("c", 40)):
        of.wait(waiter, amount)
    ask = asked(of)
    of.wait("large", 6)
    of.wait("small", 1)
    of.forget("gone")
    outcomes = of.on_answer(granted(ask, 105, (2,), unposted=49), START_S)
    served = [Taken("a", "lease_1", 60), Denied("b", True), Taken("c", "lease_1", 40)]
    assert outcomes == [*served, Taken("small", "lease_1", 1)]
    assert asked(of).needs_nanousd == (6,)


@pytest.mark.parametrize(("unposted", "spent_up"), [(9, True), (10, False)])
def test_a_refusal_says_whether_waiting_is_of_use(unposted: int, spent_up: bool) -> None:
    of = make_slice()
    of.wait("a", 10)
    assert of.on_answer(granted(asked(of), 0, (0,), unposted), START_S) == [Denied("a", spent_up)]
    assert of.is_denied(10, START_S + DENIED_S - 0.01) is spent_up  # 8
    assert not of.is_denied(10, START_S + DENIED_S)
    assert not of.is_denied(9, START_S)
    assert of.is_idle(START_S) is not spent_up, "a lease of nothing is none, but a refusal is remembered"
    assert of.is_idle(START_S + DENIED_S)


def refuse(of: Slice, amount: int, now_s: float) -> None:
    of.wait("w", amount)
    assert of.on_answer(granted(asked(of, now_s), 0, (0,), unposted=0), now_s) == [Denied("w", True)]


@pytest.mark.parametrize("amounts", [(20, 10), (10, 20)])
def test_the_smallest_of_what_was_just_refused_is_remembered(amounts: tuple[int, int]) -> None:  # 8
    of = make_slice()
    refuse(of, amounts[0], START_S)
    refuse(of, amounts[1], START_S + 0.5)
    assert of.is_denied(10, START_S + 0.5) and not of.is_denied(9, START_S + 0.5)
    refuse(of, 30, START_S + 5)
    assert of.is_denied(30, START_S + 5) and not of.is_denied(29, START_S + 5), (
        "what was long ago is forgotten"
    )


def test_a_lease_ends_by_the_time_of_its_ask() -> None:  # 5
    of = make_slice()
    of.wait("a", 10)
    ask = asked(of)
    of.on_answer(granted(ask, 100), START_S + 1.5)
    assert of.take(10, START_S + VALID_S - 0.01) == "lease_1"
    assert of.take(10, START_S + VALID_S) is None


def test_a_lease_is_closed_when_the_fate_of_its_jobs_is_known() -> None:  # 6
    of = with_lease(100)
    assert of.take(20, START_S) == "lease_1"
    assert of.take(30, START_S) == "lease_1"
    of.drain()
    now_s = START_S + 1
    assert of.tick(now_s) == (None, [])
    of.resolve("lease_1", 20)
    assert of.tick(now_s) == (None, [])
    of.resolve("lease_1", 0)
    told = asked(of, now_s)
    assert (told.needs_nanousd, told.wanted_nanousd, told.closed) == ((), 0, (("lease_1", 40),))
    assert of.tick(now_s + RESEND_S - 0.01) == (None, [])
    assert asked(of, now_s + RESEND_S).closed == (("lease_1", 40),), "until billing confirms it"
    assert not of.is_idle(now_s + RESEND_S)
    assert of.on_answer(granted(told, 0), now_s + 1) == []
    assert of.tick(START_S + 10) == (None, []) and of.is_idle(START_S + 10)


@pytest.mark.parametrize(
    ("amount", "taken", "after_s", "asks"),
    [
        pytest.param(100, 64, 1.0, False, id="26 of 100 left"),
        pytest.param(100, 65, 1.0, True, id="a quarter left"),
        pytest.param(100, 0, VALID_S - NEARLY_OVER_S - 0.01, False, id="time left"),
        pytest.param(100, 0, VALID_S - NEARLY_OVER_S, True, id="used, and nearly over"),
        pytest.param(10, 0, 1.0, False, id="at the cap: single requests"),
    ],
)
def test_the_next_lease_is_asked_for_ahead(amount: int, taken: int, after_s: float, asks: bool) -> None:  # 7
    of = with_lease(amount)
    if taken:
        assert of.take(taken, START_S) == "lease_1"
    ask, _ = of.tick(START_S + after_s)
    if not asks:
        assert ask is None
        return
    assert ask is not None and ask.needs_nanousd == () and ask.closed == ()
    assert ask.wanted_nanousd == max(taken or 10, (10 + taken) * AHEAD_MS // int(after_s * 1000))
    left = amount - 10 - taken
    assert of.take(left, START_S + after_s) == "lease_1", "the old one is spent until the answer"
    of.on_answer(granted(ask, 500), START_S + after_s)
    assert of.take(1, START_S + after_s) == ask.lease_id


def test_what_is_asked_for_ahead_serves_one_usual_request() -> None:  # 7
    of = with_lease(100)
    assert of.take(50, START_S) == "lease_1"
    of.resolve("lease_1", 50)
    ask = asked(of, START_S + VALID_S - NEARLY_OVER_S)
    assert (ask.wanted_nanousd, ask.unit_nanousd) == (50, 50)


def test_nothing_is_remembered_when_it_ends() -> None:
    of = make_slice()
    refuse(of, 10, START_S)
    of.drain()
    assert of.is_idle(START_S)


def test_an_ask_is_bounded() -> None:
    of = make_slice()
    for number in range(MAX_NEEDS + 5):
        of.wait(f"w{number}", 1)
    ask = asked(of)
    assert len(ask.needs_nanousd) == MAX_NEEDS
    assert len(of.on_answer(granted(ask, MAX_NEEDS), START_S)) == MAX_NEEDS
    assert len(asked(of).needs_nanousd) == 5
    for number in range(MAX_NEEDS):
        of.wait(f"later{number}", 1)
    _, outcomes = of.tick(START_S + ASK_S)
    assert len(outcomes) == 5, "whoever was not asked for is still to be answered"


# ---- a world


@dataclass
class Gateway:
    slice: Slice
    alive: bool = True


@dataclass
class Job:
    lease_id: str
    gateway: Gateway
    reserved: int
    fate: str = "in doubt"
    """in doubt, published, never (certainly not published), posted."""


@dataclass
class Question:
    gateway: Gateway
    ask: Ask
    sent_s: float


@dataclass
class Billing:
    """As the handler does it: one ask after the other, each lease once."""

    limit: int
    posted: int = 0
    leases: dict[str, Lease] = field(default_factory=dict)
    expires_s: dict[str, float] = field(default_factory=dict)
    given: dict[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)

    def account(self) -> Account:
        return Account(self.limit, self.posted, sum(map(held_nanousd, self.leases.values())))

    def answer(self, ask: Ask, now_s: float) -> Answer:
        for lease_id, spent in ask.closed:
            lease = self.leases.get(lease_id)
            self.leases[lease_id] = Lease(0, 0, 0, 0) if lease is None else close(lease, spent)
        if ask.lease_id not in self.leases and (ask.needs_nanousd or ask.wanted_nanousd):
            got = grant(self.account(), ask.needs_nanousd, ask.wanted_nanousd, ask.unit_nanousd)
            self.leases[ask.lease_id] = Lease(got.granted_nanousd, None, 0, 10**9)
            self.expires_s[ask.lease_id] = now_s + VALID_S
            self.given[ask.lease_id] = (got.refused, got.unposted_nanousd)
        lease = self.leases.get(ask.lease_id, Lease(0, 0, 0, 0))
        refused, unposted = self.given.get(ask.lease_id, (tuple(range(len(ask.needs_nanousd))), 0))
        closed = [lease_id for lease_id, _ in ask.closed]
        return Answer(ask.lease_id, lease.granted_nanousd, VALID_S, refused, unposted, closed)


class World(RuleBasedStateMachine):
    """Two gateways share a budget; their words and billing's are lost, repeated and overtake each other."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = START_S
        self.numbers = itertools.count(1)
        self.gateways = [Gateway(Slice(self.new_id)), Gateway(Slice(self.new_id))]
        self.billing = Billing(1_000)
        self.questions: list[Question] = []
        self.answers: list[tuple[Gateway, Answer]] = []
        self.waiting: dict[str, tuple[Gateway, int]] = {}
        self.jobs: list[Job] = []

    def new_id(self) -> str:
        return f"lease_{next(self.numbers)}"

    def note(self, gateway: Gateway, outcomes: list[Taken | Denied | Unanswered]) -> None:
        for outcome in outcomes:
            of, amount = self.waiting.pop(outcome.waiter)
            assert of is gateway
            if isinstance(outcome, Taken):
                assert outcome.amount == amount
                self.began(gateway, outcome.lease_id, amount)

    def began(self, gateway: Gateway, lease_id: str, amount: int) -> None:
        assert self.now_s < self.billing.expires_s[lease_id], "it counts on a lease that is over for billing"
        self.jobs.append(Job(lease_id, gateway, amount))

    @rule(which=st.integers(0, 1), amount=st.integers(1, 300))
    def request(self, which: int, amount: int) -> None:
        gateway = self.gateways[which]
        if not gateway.alive or gateway.slice.is_denied(amount, self.now_s):
            return
        lease_id = gateway.slice.take(amount, self.now_s)
        if lease_id is not None:
            self.began(gateway, lease_id, amount)
            return
        waiter = f"wait_{next(self.numbers)}"
        gateway.slice.wait(waiter, amount)
        self.waiting[waiter] = (gateway, amount)

    @rule(by=st.sampled_from([0.01, 0.3, RESEND_S, 1.5, 4.0]))
    def tick(self, by: float) -> None:
        self.now_s += by
        for gateway in self.gateways:
            if gateway.alive:
                ask, outcomes = gateway.slice.tick(self.now_s)
                self.note(gateway, outcomes)
                if ask is not None:
                    self.questions.append(Question(gateway, ask, self.now_s))

    @precondition(lambda self: self.questions)
    @rule(data=st.data(), again=st.booleans(), lost=st.booleans())
    def a_question_arrives(self, data: st.DataObject, again: bool, lost: bool) -> None:
        question = data.draw(st.sampled_from(self.questions))
        if not again:
            self.questions.remove(question)
        if lost or self.now_s > question.sent_s + 2.0:
            return
        self.answers.append((question.gateway, self.billing.answer(question.ask, self.now_s)))

    @precondition(lambda self: self.answers)
    @rule(data=st.data(), again=st.booleans(), lost=st.booleans())
    def an_answer_arrives(self, data: st.DataObject, again: bool, lost: bool) -> None:
        gateway, answer = data.draw(st.sampled_from(self.answers))
        if not again:
            self.answers = [pair for pair in self.answers if pair[1] is not answer]
        if gateway.alive and not lost:
            self.note(gateway, gateway.slice.on_answer(answer, self.now_s))

    @precondition(lambda self: any(job.fate == "in doubt" and job.gateway.alive for job in self.jobs))
    @rule(data=st.data(), published=st.booleans())
    def a_job_is_published_or_not(self, data: st.DataObject, published: bool) -> None:
        doubtful = [job for job in self.jobs if job.fate == "in doubt" and job.gateway.alive]
        job = data.draw(st.sampled_from(doubtful))
        job.fate = "published" if published else "never"
        job.gateway.slice.resolve(job.lease_id, 0 if published else job.reserved)

    @precondition(lambda self: any(job.fate == "published" for job in self.jobs))
    @rule(data=st.data())
    def a_job_is_posted(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from([job for job in self.jobs if job.fate == "published"]))
        job.fate = "posted"
        self.billing.posted += data.draw(st.integers(0, job.reserved))
        self.billing.leases[job.lease_id] = settle(self.billing.leases[job.lease_id], job.reserved)

    @precondition(lambda self: all(gateway.alive for gateway in self.gateways))
    @rule()
    def a_gateway_is_killed(self) -> None:
        self.gateways[0].alive = False
        self.waiting = {w: each for w, each in self.waiting.items() if each[0].alive}

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def a_client_goes(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(sorted(self.waiting)))
        gateway, _ = self.waiting.pop(waiter)
        gateway.slice.forget(waiter)

    @invariant()
    def no_overshoot(self) -> None:
        account = self.billing.account()
        may_come = sum(job.reserved for job in self.jobs if job.fate in ("in doubt", "published"))
        assert account.posted_nanousd + may_come <= account.posted_nanousd + account.held_nanousd <= 1_000

    def teardown(self) -> None:
        """When all is quiet a living gateway holds nothing."""
        for job in self.jobs:
            if job.fate == "in doubt" and job.gateway.alive:
                job.fate = "published"
                job.gateway.slice.resolve(job.lease_id, 0)
        for gateway in self.gateways:
            gateway.slice.drain()
        self.questions, self.answers = [], []
        for _ in range(90):  # a lease ends, the one that was asked for ahead as well, and both are closed
            self.tick(by=0.3)
            for question in self.questions:
                answer = self.billing.answer(question.ask, self.now_s)
                if question.gateway.alive:
                    self.note(question.gateway, question.gateway.slice.on_answer(answer, self.now_s))
            self.questions = []
            for job in self.jobs:
                if job.fate == "in doubt" and job.gateway.alive:
                    job.fate = "published"
                    job.gateway.slice.resolve(job.lease_id, 0)
        assert all(gateway.slice.is_idle(self.now_s) for gateway in self.gateways if gateway.alive)
        assert not self.waiting
        if self.gateways[0].alive:
            unposted = sum(job.reserved for job in self.jobs if job.fate == "published")
            assert self.billing.account().held_nanousd == unposted


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
