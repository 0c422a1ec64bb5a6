"""Facts and commands with sensible defaults for tests of billing."""

from __future__ import annotations

from typing import Any

from shared.messages import GrantCredit, JobUsage, JobVoided, PaymentReported, SetPrice, SetTeamTerms, Timings

ACCEPTED_UNIX_MS = 1_790_000_000_000

_SUBJECT = {
    "job_id": "job_1",
    "request_id": "req_1",
    "team_id": "team_a",
    "key_id": "key_a",
    "resource_id": "res_pool",
    "billing": "ppt",
    "work_class": "live",
    "operation": "chat",
    "model_type": "smollm2-135m",
    "model_id": "model_a",
    "model_name": "demo/smollm2",
    "revision": 1,
    "prompt_tokens": 10,
    "accepted_unix_ms": ACCEPTED_UNIX_MS,
}


COMMAND: dict[str, Any] = {
    "command_id": "cmd_1",
    "deadline_unix_ms": 4_000_000_000_000,
    "reply_queue": "replies.v1.test",
    "actor": "key_admin",
}


def make_usage(**fields: Any) -> JobUsage:
    """A worker's fact: attempt 1 succeeded with 10 prompt and 20 completion tokens."""
    values: dict[str, Any] = {
        **_SUBJECT,
        "attempt": 1,
        "worker_id": "worker_1",
        "outcome": "succeeded",
        "completion_tokens": 20,
        "prefill_ran": True,
        "finished_unix_ms": ACCEPTED_UNIX_MS + 2_000,
        "first_token_unix_ms": ACCEPTED_UNIX_MS + 500,
        "timings": Timings(queue_ms=1.5, prefill_ms=20.0, decode_ms=300.0),
        **fields,
    }
    values.setdefault("event_id", f"evt_{values['job_id']}_{values['attempt']}")
    return JobUsage(**values)


def make_void(**fields: Any) -> JobVoided:
    """A gateway's fact: the client went after 5 tokens."""
    values: dict[str, Any] = {
        **_SUBJECT,
        "reason": "client_gone",
        "delivered_tokens": 5,
        "voided_unix_ms": ACCEPTED_UNIX_MS + 1_000,
        **fields,
    }
    values.setdefault("event_id", f"evt_{values['job_id']}_void")
    return JobVoided(**values)


def make_set_price(**fields: Any) -> SetPrice:
    values: dict[str, Any] = {
        **COMMAND,
        "model_type": "smollm2-135m",
        "work_class": "live",
        "prompt_nanousd": 20,
        "completion_nanousd": 60,
        "starts_unix_ms": 0,
        **fields,
    }
    return SetPrice(**values)


def make_credit(**fields: Any) -> GrantCredit:
    """Five USD for team_a."""
    values: dict[str, Any] = {
        **COMMAND,
        "team_id": "team_a",
        "amount_nanousd": 5_000_000_000,
        "reason": "welcome",
        **fields,
    }
    return GrantCredit(**values)


def make_terms(**fields: Any) -> SetTeamTerms:
    """team_a pays before."""
    values: dict[str, Any] = {**COMMAND, "team_id": "team_a", "pays": "prepaid", **fields}
    return SetTeamTerms(**values)


def make_payment(what: Any, **fields: Any) -> PaymentReported:
    """Five USD of team_a's, or of what became of them."""
    values: dict[str, Any] = {
        "provider": "stripe",
        "event_id": f"evt_{what}",
        "payment_id": "pi_1",
        "amount_nanousd": 5_000_000_000,
        "team_id": "team_a" if what == "paid" else None,
        **fields,
    }
    return PaymentReported(what=what, **values)
