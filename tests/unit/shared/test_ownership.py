"""The owner's decisions: who may run a job, which tokens count, how it ends."""

from __future__ import annotations

import random
from typing import Any

import pytest

from shared.messages import (
    CancelJob,
    ChoiceResult,
    Drop,
    EmbedJob,
    FinishedReport,
    GenerateJob,
    Granted,
    Job,
    JobClaimed,
    JobFinished,
    ModelRef,
    RepeatTokens,
    TokenDelta,
)
from shared.ownership import (
    HOLDER_SILENCE_S,
    LOST_SILENCE_S,
    MAX_ATTEMPTS,
    Action,
    Deliver,
    End,
    Grant,
    Hold,
    JobState,
    OwnedJob,
    Refuse,
    Republish,
    Send,
    decide_claim,
)


def make_job(choices: int = 1) -> GenerateJob:
    return GenerateJob(
        job_id="job_1",
        request_id="req_1",
        team_id="team_1",
        key_id="key_1",
        resource_id="res_1",
        billing="ppt",
        work_class="live",
        operation="chat",
        model_type="t",
        model=ModelRef(model_id="m", revision=1, name="t/m", folder="m/1", signature="0" * 16),
        owner_queue="replies.v1.gw",
        prompt_tokens=[1],
        max_tokens=100,
        accepted_unix_ms=0,
        deadline_unix_ms=60_000,
        choices=choices,
    )


def claim(worker: str, claim_id: str = "") -> JobClaimed:
    return JobClaimed(
        job_id="job_1", claim_id=claim_id or f"clm_{worker}", worker_id=worker, worker_queue=f"q.{worker}"
    )


def delta(attempt: int, start: int, count: int = 1, choice: int = 0, finish: str | None = None) -> TokenDelta:
    return TokenDelta(
        job_id="job_1",
        attempt=attempt,
        choice=choice,
        token_start=start,
        tokens=list(range(start, start + count)),
        text="".join(f"<{i}>" for i in range(start, start + count)),
        finish_reason=finish,  # type: ignore[arg-type]
    )


def sent(actions: list[Action], kind: type) -> list[object]:
    return [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, kind)]


def granted_job(now_s: float = 0.0, choices: int = 1) -> OwnedJob:
    owned = OwnedJob(make_job(choices), deadline_s=60.0, now_s=now_s)
    [grant] = sent(owned.on_claim(claim("a"), now_s), Granted)
    assert isinstance(grant, Granted) and grant.attempt == 1
    return owned


CLAIM = {
    "state": JobState.RUNNING,
    "attempt": 1,
    "holder_worker_id": "a",
    "holder_last_word_s": 10.0,
    "claimant_worker_id": "b",
    "claimed_s": 10.5,
    "now_s": 10.6,
    "deadline_s": 60.0,
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"state": JobState.SUCCEEDED}, Refuse("finished")),
        ({"state": JobState.FAILED}, Refuse("finished")),
        ({"state": JobState.CANCELLED}, Refuse("cancelled")),
        ({"state": JobState.EXPIRED}, Refuse("expired")),
        ({"now_s": 60.0}, Refuse("expired")),
        ({"claimant_worker_id": "a"}, Grant(1)),
        ({"holder_last_word_s": 11.2, "now_s": 11.3}, Refuse("running_elsewhere")),
        ({}, Hold()),
        ({"now_s": 10.0 + HOLDER_SILENCE_S}, Grant(2)),
        ({"attempt": MAX_ATTEMPTS, "now_s": 20.0}, Refuse("poison")),
        ({"state": JobState.QUEUED, "attempt": 0, "holder_worker_id": None}, Grant(1)),
    ],
)
def test_claim_decision_follows_its_numbered_rules(change: dict[str, object], expected: object) -> None:
    assert decide_claim(**{**CLAIM, **change}) == expected  # type: ignore[arg-type]


def test_tokens_come_in_order_and_once_when_deltas_are_doubled() -> None:
    owned = granted_job()
    assert owned.on_delta("a", delta(1, 0, 2), 1.0) == [Deliver(0, (0, 1), "<0><1>", (), None)]
    assert owned.on_delta("a", delta(1, 0, 2), 1.0) == []
    assert owned.on_delta("a", delta(1, 2), 1.0) == [Deliver(0, (2,), "<2>", (), None)]


def test_a_gap_is_asked_for_once_per_interval_and_nothing_after_it_is_delivered() -> None:
    owned = granted_job()
    actions = owned.on_delta("a", delta(1, 3), 1.0)
    assert sent(actions, RepeatTokens) == [RepeatTokens(job_id="job_1", attempt=1, choice=0, token_start=0)]
    assert owned.on_delta("a", delta(1, 4), 1.1) == []
    assert sent(owned.on_delta("a", delta(1, 5), 2.0), RepeatTokens) != []
    assert owned.on_delta("a", delta(1, 0, 6), 2.1) == [
        Deliver(0, (0, 1, 2, 3, 4, 5), "<0><1><2><3><4><5>", (), None)
    ]


def test_the_finish_mends_what_was_lost_on_the_way() -> None:
    owned = granted_job()
    owned.on_delta("a", delta(1, 0, 2), 1.0)
    result = ChoiceResult(index=0, tokens=[0, 1, 2, 3], text="<0><1><2><3>", finish_reason="stop")
    finished = JobFinished(job_id="job_1", attempt=1, worker_id="a", outcome="succeeded", choices=[result])
    rest, end = owned.on_finished(finished, 2.0)
    assert rest == Deliver(0, (2, 3), "<2><3>", (), "stop")
    assert isinstance(end, End) and end.by_worker and end.outcome == "succeeded"
    assert owned.on_finished(finished, 2.1) == []


def test_a_second_attempt_resumes_with_the_tokens_that_the_owner_has() -> None:
    owned = granted_job()
    owned.on_delta("a", delta(1, 0, 5), 1.0)
    assert owned.on_claim(claim("b"), 1.1) == []  # held: a may live
    actions = owned.on_tick(1.0 + HOLDER_SILENCE_S, 100.0)
    [grant] = sent(actions, Granted)
    assert isinstance(grant, Granted)
    assert (grant.attempt, grant.prior_tokens) == (2, [[0, 1, 2, 3, 4]])
    assert sent(actions, CancelJob) == [CancelJob(job_id="job_1", attempt=1, reason="replaced")]
    # The old holder wakes up: nothing of it counts.
    assert owned.on_delta("a", delta(1, 5), 4.0) == []
    assert owned.on_delta("b", delta(2, 5), 4.0) == [Deliver(0, (5,), "<5>", (), None)]
    # The finish of attempt 2 has the text of attempt 2 alone.
    result = ChoiceResult(index=0, tokens=[0, 1, 2, 3, 4, 5, 6], text="<5><6>", finish_reason="length")
    done = JobFinished(job_id="job_1", attempt=2, worker_id="b", outcome="succeeded", choices=[result])
    assert owned.on_finished(done, 5.0)[0] == Deliver(0, (6,), "<6>", (), "length")


def test_the_first_word_on_a_job_makes_its_speaker_the_holder() -> None:
    owned = OwnedJob(make_job(), deadline_s=60.0, now_s=0.0)
    assert owned.on_delta("a", delta(1, 0, 2), 0.1) == [Deliver(0, (0, 1), "<0><1>", (), None)]
    assert owned.on_delta("b", delta(1, 0, 2), 0.1) == []  # a second copy's worker comes too late
    [grant] = sent(owned.on_claim(claim("a"), 0.2), Granted)
    assert isinstance(grant, Granted) and grant.attempt == 1
    owned.on_claim(claim("b"), 0.2)
    [drop] = sent(owned.on_beat("a", 1, 1.5), Drop)
    assert isinstance(drop, Drop) and drop.reason == "running_elsewhere"


def test_a_first_word_counts_neither_for_a_later_attempt_nor_after_the_end() -> None:
    owned = OwnedJob(make_job(), deadline_s=60.0, now_s=0.0)
    assert owned.on_delta("a", delta(2, 0), 0.1) == []
    assert owned.state is JobState.QUEUED
    owned.give_up("cancelled", "client_gone", None, 0.2)
    assert owned.on_delta("a", delta(1, 0), 0.3) == []


def test_a_finish_that_overtakes_its_claim_ends_the_job_and_the_claim_learns_of_it() -> None:
    owned = OwnedJob(make_job(), deadline_s=60.0, now_s=0.0)
    result = ChoiceResult(index=0, tokens=[0, 1], text="<0><1>", finish_reason="stop")
    finished = JobFinished(job_id="job_1", attempt=1, worker_id="a", outcome="succeeded", choices=[result])
    rest, end = owned.on_finished(finished, 0.1)
    assert isinstance(rest, Deliver) and isinstance(end, End) and end.by_worker
    report = FinishedReport(attempt=1, outcome="succeeded", completion_tokens=2)
    for worker in ("a", "b"):  # the finisher, and the worker of a second delivery
        [drop] = sent(owned.on_claim(claim(worker), 0.2), Drop)
        assert isinstance(drop, Drop) and (drop.reason, drop.report) == ("finished", report)


def test_a_claim_is_refused_when_the_holder_speaks_after_it() -> None:
    owned = granted_job()
    owned.on_claim(claim("b"), 1.0)
    actions = owned.on_beat("a", 1, 1.8)
    assert sent(actions, Drop) == [Drop(job_id="job_1", claim_id="clm_b", reason="running_elsewhere")]


def test_the_same_worker_gets_the_same_attempt_again() -> None:
    owned = granted_job()
    owned.on_delta("a", delta(1, 0, 3), 1.0)
    [grant] = sent(owned.on_claim(claim("a"), 1.1), Granted)
    assert isinstance(grant, Granted) and (grant.attempt, grant.prior_tokens) == (1, [[0, 1, 2]])


def test_a_job_is_poison_after_its_last_attempt_and_says_so() -> None:
    owned = OwnedJob(make_job(), deadline_s=60.0, now_s=0.0)
    now_s = 0.0
    for attempt in range(1, MAX_ATTEMPTS + 1):
        now_s += HOLDER_SILENCE_S
        [grant] = sent(owned.on_claim(claim(f"w{attempt}"), now_s), Granted)
        assert isinstance(grant, Granted) and grant.attempt == attempt
    now_s += HOLDER_SILENCE_S
    actions = owned.on_claim(claim("w9"), now_s)
    [drop] = sent(actions, Drop)
    assert isinstance(drop, Drop) and drop.reason == "poison"
    [end] = [a for a in actions if isinstance(a, End)]
    assert (end.outcome, end.error_code, end.by_worker) == ("failed", "poison", False)
    assert owned.state is JobState.FAILED


def test_the_deadline_ends_the_job_and_stops_the_worker() -> None:
    owned = granted_job()
    actions = owned.on_tick(60.0, 100.0)
    assert sent(actions, CancelJob) == [CancelJob(job_id="job_1", attempt=1, reason="deadline_exceeded")]
    [end] = [a for a in actions if isinstance(a, End)]
    assert (end.outcome, end.by_worker) == ("expired", False)
    assert owned.on_tick(61.0, 100.0) == []


def test_a_silent_holder_makes_the_owner_publish_again_only_while_it_is_connected_itself() -> None:
    owned = granted_job()
    assert owned.on_tick(LOST_SILENCE_S + 1, 2.0) == []
    assert owned.on_tick(LOST_SILENCE_S + 1, 100.0) == [Republish()]
    assert owned.on_tick(LOST_SILENCE_S + 2, 100.0) == []


def test_a_publish_without_a_confirm_is_repeated_once_the_owner_is_connected_again() -> None:
    owned = OwnedJob(make_job(), deadline_s=60.0, now_s=0.0)
    owned.publish_confirmed = False
    assert owned.on_tick(1.0, 0.0) == []
    assert owned.on_tick(5.0, 1.5) == [Republish()]
    owned.publish_confirmed = True
    assert owned.on_tick(6.0, 2.5) == []
    owned.publish_confirmed = False
    owned.on_claim(claim("a"), 7.0)  # it was in the queue after all
    assert owned.on_tick(7.5, 4.0) == []


def test_a_claim_held_while_the_job_ends_is_dropped() -> None:
    owned = granted_job()
    owned.on_claim(claim("b"), 0.5)
    actions = owned.give_up("cancelled", "client_gone", None, 0.6)
    assert sent(actions, Drop) == [Drop(job_id="job_1", claim_id="clm_b", reason="finished")]
    assert owned.give_up("cancelled", "client_gone", None, 0.7) == []


def test_the_dead_letter_consumers_word_counts_only_while_nobody_runs_the_job() -> None:
    dead = JobFinished(
        job_id="job_1", attempt=0, worker_id="scheduler", outcome="failed", error_code="dead_letter"
    )
    queued = OwnedJob(make_job(), deadline_s=60.0, now_s=0.0)
    [end] = queued.on_finished(dead, 1.0)
    assert isinstance(end, End) and end.error_code == "dead_letter" and not end.by_worker
    assert granted_job().on_finished(dead, 1.0) == []


def test_each_choice_keeps_its_own_place() -> None:
    owned = granted_job(choices=2)
    owned.on_delta("a", delta(1, 0, 2, choice=1), 1.0)
    owned.on_delta("a", delta(1, 0, 1, choice=0, finish="stop"), 1.0)
    assert owned.tokens == [[0], [0, 1]]
    assert owned.on_delta("a", delta(1, 1, 1, choice=0), 1.0) == []  # a finished choice takes nothing more
    assert owned.on_delta("a", delta(1, 0, 1, choice=7), 1.0) == []


@pytest.mark.parametrize("seed", range(300))
def test_any_loss_doubling_reordering_and_crash_still_shows_each_token_once_in_order(seed: int) -> None:
    """A small world: workers that die or freeze, a broker that loses, doubles and delays; one client."""
    rng = random.Random(seed)
    total = 30
    owned = OwnedJob(make_job(), deadline_s=1e9, now_s=0.0)
    shown: list[int] = []
    now_s = 0.0
    wire: list[tuple[str, Any]] = []
    workers: dict[str, dict[str, int]] = {}
    crashes = 0

    def act(actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Deliver):
                shown.extend(action.tokens)
            elif isinstance(action, Republish):
                wire.append(("job", None))
            elif isinstance(action, Send) and isinstance(action.message, Granted):
                name = action.queue.removeprefix("q.")
                prior = len(action.message.prior_tokens[0])
                workers[name] = {"attempt": action.message.attempt, "prior": prior, "next": prior}
            elif isinstance(action, Send) and isinstance(action.message, RepeatTokens):
                name = action.queue.removeprefix("q.")
                start = action.message.token_start
                if name in workers and workers[name]["next"] > start >= workers[name]["prior"]:
                    count = workers[name]["next"] - start
                    wire.append((name, delta(workers[name]["attempt"], start, count)))

    fresh = iter(range(10_000))
    wire.append(("job", None))
    for _ in range(5000):
        if owned.over:
            break
        now_s += 0.05
        for name, worker in list(workers.items()):
            if worker["next"] < total:
                wire.append((name, delta(worker["attempt"], worker["next"])))
                worker["next"] += 1
            else:
                tokens = list(range(total))
                text = "".join(f"<{i}>" for i in range(worker["prior"], total))
                result = ChoiceResult(index=0, tokens=tokens, text=text, finish_reason="length")
                end = JobFinished(
                    job_id="job_1",
                    attempt=worker["attempt"],
                    worker_id=name,
                    outcome="succeeded",
                    choices=[result],
                )
                wire.append((name, end))
                del workers[name]
        if workers and crashes < MAX_ATTEMPTS - 1 and rng.random() < 0.03:
            workers.pop(rng.choice(list(workers)))
            crashes += 1
            wire.append(("job", None))  # the broker delivers again
        for name, worker in workers.items():
            act(owned.on_beat(name, worker["attempt"], now_s))
        rng.shuffle(wire)
        for _ in range(rng.randint(0, len(wire))):
            name, message = wire.pop()
            if message is None:
                act(owned.on_claim(claim(f"w{next(fresh)}"), now_s))
            elif isinstance(message, JobFinished):
                act(owned.on_finished(message, now_s))
            elif rng.random() > 0.1:  # deltas are transient: some are lost
                act(owned.on_delta(name, message, now_s))
                if rng.random() < 0.1:
                    wire.append((name, message))
        act(owned.on_tick(now_s, 1e9))
    assert owned.state is JobState.SUCCEEDED
    assert shown == list(range(total))


# ---- jobs without an answer


def owned_embed_job() -> OwnedJob:
    common = {name: getattr(make_job(), name) for name in Job.__struct_fields__}
    return OwnedJob(
        EmbedJob(**common, operation="embeddings", inputs=[[1], [2, 3]]), deadline_s=60.0, now_s=0.0
    )


def embedded(worker: str, attempt: int) -> JobFinished:
    vectors = [worker.encode(), b"second"]
    return JobFinished(
        job_id="job_1", attempt=attempt, worker_id=worker, outcome="succeeded", embeddings=vectors
    )


def test_vectors_come_with_the_end_and_the_report_has_no_tokens() -> None:
    owned = owned_embed_job()
    [answer] = owned.on_claim(claim("w1"), 1.0)
    assert isinstance(answer, Send) and isinstance(answer.message, Granted)
    assert (answer.message.attempt, answer.message.prior_tokens) == (1, [])
    [end] = owned.on_finished(embedded("w1", 1), 2.0)
    assert isinstance(end, End)
    assert (end.outcome, end.embeddings, end.by_worker) == ("succeeded", (b"w1", b"second"), True)
    assert owned.report == FinishedReport(attempt=1, outcome="succeeded", completion_tokens=0)


def test_a_dead_workers_vectors_do_not_count_once_another_has_the_job() -> None:
    owned = owned_embed_job()
    owned.on_claim(claim("w1"), 1.0)
    owned.on_claim(claim("w2"), 2.0)
    grant, *_ = [
        action.message
        for action in owned.on_tick(2.0 + HOLDER_SILENCE_S, 100.0)
        if isinstance(action, Send) and isinstance(action.message, Granted)
    ]
    assert (grant.attempt, grant.prior_tokens) == (2, [])
    assert owned.on_finished(embedded("w1", 1), 5.0) == []
    [end] = owned.on_finished(embedded("w2", 2), 6.0)
    assert isinstance(end, End) and end.embeddings == (b"w2", b"second")


def test_tokens_for_a_job_without_choices_are_ignored() -> None:
    owned = owned_embed_job()
    owned.on_claim(claim("w1"), 1.0)
    assert owned.on_delta("w1", delta(1, 0), 2.0) == []
    assert not owned.over


def test_a_failed_job_has_no_vectors() -> None:
    owned = owned_embed_job()
    owned.on_claim(claim("w1"), 1.0)
    actions = owned.give_up("expired", "deadline_exceeded", None, 60.0)
    [end] = [action for action in actions if isinstance(action, End)]
    assert (end.outcome, end.embeddings, end.by_worker) == ("expired", (), False)
