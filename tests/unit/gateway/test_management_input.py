"""What `/api` reads from bodies, queries and cursors, as tables."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.management import bodies
from services.gateway.management.acting import read_cursor, read_time, write_cursor
from services.gateway.management.models import derived_type_name
from services.gateway.management.usage import read_position, usage_range
from shared.inference.errors import ApiError
from shared.model_folder import ModelManifest

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("document", "code", "param"),
    [
        ({"gpus": 1, "x": 1}, "unknown_parameter", "x"),
        ({"gpus": 1, "a b<": 1}, "unknown_parameter", "?"),
        ({}, "missing_parameter", "gpus"),
        ({"gpus": "5"}, "invalid_type", "gpus"),
        ({"gpus": 5.0}, "invalid_type", "gpus"),
        ({"gpus": True}, "invalid_type", "gpus"),
        ({"gpus": None}, "invalid_type", "gpus"),
        ({"gpus": -1}, "invalid_value", "gpus"),
        ({"gpus": 65}, "invalid_value", "gpus"),
        ({"gpus": 2**63}, "invalid_value", "gpus"),
    ],
)
def test_a_body_is_refused_by_field(document: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        bodies.parse(document, bodies.ScaleResource)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)


@pytest.mark.parametrize("gpus", [0, 64])
def test_the_limits_themselves_are_accepted(gpus: int) -> None:
    assert bodies.parse({"gpus": gpus}, bodies.ScaleResource).gpus == gpus


def test_every_body_has_a_closed_schema() -> None:
    kinds = [kind for kind in bodies.Body.__subclasses__() if kind.__module__ == bodies.__name__]
    assert len(kinds) >= 8
    _, components = msgspec.json.schema_components(kinds)
    assert all(component["additionalProperties"] is False for component in components.values())


@given(st.from_regex(r"[0-9a-z_:]{1,100}", fullmatch=True))
def test_a_cursor_comes_back_as_it_was(after: str) -> None:
    assert read_cursor(write_cursor(after)) == after


@pytest.mark.parametrize("cursor", ["", "!", "A", "ww", "Jw", "ICc7IGRyb3A"])
def test_a_forged_cursor_is_refused(cursor: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_cursor(cursor)
    assert caught.value.code == "invalid_cursor"


def test_a_position_is_a_moment_and_a_job() -> None:
    assert read_position("") is None
    assert read_position("1000001:job_1") == (datetime(1970, 1, 1, 0, 0, 1, 1, tzinfo=UTC), "job_1")
    for bad in ("abc", "x:job_1", "1" * 17 + ":job_1", ":job_1"):
        with pytest.raises(ApiError):
            read_position(bad)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-11-01", datetime(2026, 11, 1, tzinfo=UTC)),
        ("2026-11-01T00:00:00Z", datetime(2026, 11, 1, tzinfo=UTC)),
        ("2026-11-01T02:00:00+02:00", datetime(2026, 11, 1, tzinfo=UTC)),
    ],
)
def test_a_time_is_read(text: str, moment: datetime) -> None:
    assert read_time(text, "from") == moment


@pytest.mark.parametrize(
    "text", ["", "now", "2026-11-01T00:00:00", "2026-13-01", "1999-12-31T00:00:00Z", "٢٠٢٦-11-01"]
)
def test_a_time_without_its_meaning_is_refused(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_time(text, "from")
    assert (caught.value.code, caught.value.param) == ("invalid_value", "from")


def test_usage_is_of_the_last_thirty_days_by_day_unless_asked() -> None:
    assert usage_range({}, NOW) == (NOW - timedelta(days=30), NOW, "day")
    start, end, group_by = usage_range({"from": "2026-11-01", "to": "2026-11-02", "group_by": "key"}, NOW)
    assert (end - start, group_by) == (timedelta(days=1), "key")
    too_old = (NOW - timedelta(days=31)).date().isoformat()  # its request records are deleted
    for query in ({"from": "2026-11-24"}, {"from": too_old}, {"to": "2026-11-01", "from": "2026-11-01"}):
        with pytest.raises(ApiError):
            usage_range(query, NOW)


@pytest.mark.parametrize(
    ("architecture", "parameters", "name"),
    [
        ("LlamaForCausalLM", 134_515_008, "llama-135m-1a2b3c"),
        ("Qwen3ForCausalLM", 7_600_000_000, "qwen3-7.6b-1a2b3c"),
        ("MistralForCausalLM", 7_000_000_000, "mistral-7b-1a2b3c"),
        ("LlamaForCausalLM", 3_000, "llama-3k-1a2b3c"),
        ("LlamaForCausalLM", 10, "llama-1k-1a2b3c"),
    ],
)
def test_a_new_type_gets_a_readable_name(architecture: str, parameters: int, name: str) -> None:
    manifest = ModelManifest((), architecture, "1a2b3c4d5e6f7a8b", {}, 64, 258, (257,), parameters, False)
    assert derived_type_name(manifest) == name
    assert (
        bodies.parse({"name": "m", "path": "p", "model_type": name}, bodies.RegisterModel).model_type == name
    )
