"""Which values of a command are refused, naming the field."""

from __future__ import annotations

from typing import Any

import pytest

from services.scheduler.command_rules import problem_of
from shared.messages import CreateOption, CreateResource, ScaleResource, TurnOnResource

COMMON = {"command_id": "cmd_1", "deadline_unix_ms": 0, "reply_queue": "q", "actor": "usr_1"}
OPTION = COMMON | {
    "model_type": "smollm2-135m",
    "name": "cpu-bf16",
    "device_kind": "cpu",
    "precision": "bf16",
    "max_batch": 8,
    "max_context_tokens": 2048,
    "kv_tokens": 16384,
    "hourly_rate_nanousd": 0,
}
RESOURCE = COMMON | {
    "team_id": "t",
    "name": "Our models",
    "model_type": "a",
    "option_id": "o",
    "fixed_count": 1,
}


def test_good_commands_have_no_problem() -> None:
    assert problem_of(CreateOption(**OPTION)) is None  # type: ignore[arg-type]
    assert problem_of(CreateResource(**RESOURCE)) is None  # type: ignore[arg-type]
    assert problem_of(ScaleResource(**COMMON, team_id="t", resource_id="r", fixed_count=64)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "-x"),
        ("name", "Capital"),
        ("name", "a" * 64),
        ("name", "a\n"),
        ("model_type", ""),
        ("model_type", "a b"),
        ("model_type", "a\x00"),
        ("max_batch", 0),
        ("max_batch", 1025),
        ("max_context_tokens", 15),
        ("max_context_tokens", 10**9),
        ("kv_tokens", 2047),
        ("kv_tokens", 2**31),
        ("hourly_rate_nanousd", -1),
        ("hourly_rate_nanousd", 2**63),
        ("actor", ""),
        ("command_id", "x" * 201),
    ],
)
def test_a_bad_value_of_an_option_is_named(field: str, value: Any) -> None:
    problem = problem_of(CreateOption(**(OPTION | {field: value})))  # type: ignore[arg-type]
    assert problem is not None and problem.startswith(field)


def test_an_option_that_no_worker_could_serve_is_refused() -> None:
    fields = OPTION | {"device_kind": "cuda", "precision": "int8"}
    problem = problem_of(CreateOption(**fields))  # type: ignore[arg-type]
    assert problem == "precision int8 does not run on cuda yet"
    for device_kind, precision in (("cuda", "bf16"), ("cuda", "fp32"), ("cpu", "int8")):
        fields = OPTION | {"device_kind": device_kind, "precision": precision}
        assert problem_of(CreateOption(**fields)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", " x"),
        ("name", "x" * 101),
        ("name", "a\x00b"),
        ("name", "\ud800"),
        ("model_type", "../x"),
        ("fixed_count", -1),
        ("fixed_count", 65),
        ("team_id", ""),
        ("option_id", "a\u202eb"),
    ],
)
def test_a_bad_value_of_a_resource_is_named(field: str, value: Any) -> None:
    problem = problem_of(CreateResource(**(RESOURCE | {field: value})))  # type: ignore[arg-type]
    assert problem is not None and problem.startswith(field)


def test_an_id_that_no_column_can_hold_is_refused() -> None:
    problem = problem_of(TurnOnResource(**COMMON, team_id="t", resource_id="r\x00"))  # type: ignore[arg-type]
    assert problem is not None and problem.startswith("resource_id")
