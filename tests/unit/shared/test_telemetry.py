"""Logs and spans: no secret gets into them, and they find each other by trace id."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from shared import telemetry
from shared.telemetry import redact

ROOT = Path(__file__).resolve().parents[3]
TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
SPAN_ID = 0xB7AD6B7169203331
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("key sk-abcdEFGH1234_-xyz was used", "key sk-abcd[redacted] was used"),
        ("sk-abcdefgh sk-zyxwvuts", "sk-abcd[redacted] sk-zyxw[redacted]"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer [redacted]"),
        ("authorization: bearer abc", "authorization: bearer [redacted]"),
        ("amqp://user:pass-word@host:5672/v", "amqp://user:[redacted]@host:5672/v"),
        ("postgresql://u:p%40w@h/db?x=1", "postgresql://u:[redacted]@h/db?x=1"),
        ("redis://:secret@h:6379/0", "redis://:[redacted]@h:6379/0"),
        (
            "first amqp://a:b@h/ then redis://:c@h/",
            "first amqp://a:[redacted]@h/ then redis://:[redacted]@h/",
        ),
    ],
)
def test_a_secret_is_cut_out_and_the_rest_stays(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    ["", "task-list of the desk", "http://127.0.0.1:8080/v1/models", "amqp://host/vhost", "a@b:c", "ask-me"],
)
def test_harmless_text_is_left_alone(text: str) -> None:
    assert redact(text) == text


# ---- trace context


def test_headers_carry_the_current_trace_and_nothing_without_one() -> None:
    assert telemetry.inject_headers() == {}
    with trace.use_span(NonRecordingSpan(SpanContext(TRACE_ID, SPAN_ID, False, TraceFlags(1)))):
        assert telemetry.inject_headers() == {"traceparent": TRACEPARENT}


@pytest.mark.parametrize(
    "headers",
    [
        {"traceparent": TRACEPARENT},
        {"Traceparent": TRACEPARENT.encode()},
        {"traceparent": TRACEPARENT, "x": 5},
    ],
)
def test_the_context_in_headers_is_current_inside_and_gone_outside(headers: dict[str, Any]) -> None:
    with telemetry.remote_context(headers):
        assert trace.get_current_span().get_span_context().trace_id == TRACE_ID
    assert not trace.get_current_span().get_span_context().is_valid


@pytest.mark.parametrize("value", [None, 5, b"\xff\xff", "", "00-zz-yy-01", "0" * 10_000, ["a"], {"a": 1}])
def test_a_malformed_context_starts_a_new_trace(value: Any) -> None:
    with telemetry.remote_context({"traceparent": value, "tracestate": value}):
        assert not trace.get_current_span().get_span_context().is_valid


def test_the_context_is_gone_after_an_error() -> None:
    with pytest.raises(KeyError), telemetry.remote_context({"traceparent": TRACEPARENT}):
        raise KeyError
    assert not trace.get_current_span().get_span_context().is_valid


def test_a_span_marks_an_error_by_its_type_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "_tracer", TracerProvider().get_tracer("test"))
    with pytest.raises(ValueError, match="private"), telemetry.span("work") as span:
        raise ValueError("private text")
    shown = span.to_json()  # type: ignore[attr-defined]
    assert json.loads(shown)["status"]["status_code"] == "ERROR"
    assert json.loads(shown)["attributes"] == {"error.type": "ValueError"}
    assert "private" not in shown


def test_a_stage_that_is_over_is_a_child_with_its_own_times(monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer("test"))
    parent = telemetry.start_span_under("job", {"traceparent": TRACEPARENT})
    telemetry.record_child(parent, "swap", 1_000, 3_000, {"model": "m"})
    telemetry.record_child(parent, "backwards", 5_000, 4_000)  # clocks may be set back
    parent.end()
    swap, backwards, job = exporter.get_finished_spans()
    assert job.context is not None and job.context.trace_id == TRACE_ID
    assert job.parent is not None and job.parent.span_id == SPAN_ID
    assert swap.parent is not None and swap.parent.span_id == job.context.span_id
    assert (swap.start_time, swap.end_time) == (1_000, 3_000)
    assert (backwards.start_time, backwards.end_time) == (5_000, 5_000)


# ---- log lines, as a process writes them

_PROGRAM = """
import logging, structlog
from shared import telemetry
telemetry.setup("example", log_level="INFO")
log = structlog.get_logger()
log.debug("unseen")
log.info("alone", number=3)
with telemetry.span("work") as span:
    context = span.get_span_context()
    log.info("inside", expected=f"{context.trace_id:032x}/{context.span_id:016x}")
log.info("secrets", url="amqp://u:pass-word@h/", header="Bearer pass-word", key="sk-abcdpass-word")
log.info("nested", values={"a": ["amqp://u:pass-word@h/", ("sk-abcdpass-word",)]}, error=OSError("redis://:pass-word@h"))
try:
    raise OSError("cannot reach amqp://u:pass-word@h/")
except OSError:
    log.exception("failed")
logging.getLogger("a.library").warning("connecting to %s", "postgresql://u:pass-word@h/")
logging.getLogger("a.library").info("unseen")
try:
    raise OSError("cannot reach amqp://u:pass-word@h/")
except OSError:
    logging.getLogger("a.library").exception("broken")
telemetry.shutdown()
"""


@pytest.fixture(scope="module")
def lines() -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], cwd=ROOT, env={}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "logs go to stderr"
    return {line["event"]: line for line in map(json.loads, done.stderr.splitlines())}


def test_each_line_is_json_with_service_level_and_time(lines: dict[str, dict[str, Any]]) -> None:
    line = lines["alone"]
    assert (line["service"], line["level"], line["number"]) == ("example", "info", 3)
    assert line["timestamp"].endswith("Z")
    assert "trace_id" not in line


def test_a_line_under_a_span_names_it(lines: dict[str, dict[str, Any]]) -> None:
    line = lines["inside"]
    assert f"{line['trace_id']}/{line['span_id']}" == line["expected"]


def test_what_is_below_the_level_is_not_written(lines: dict[str, dict[str, Any]]) -> None:
    assert "unseen" not in lines


def test_no_line_shows_a_secret(lines: dict[str, dict[str, Any]]) -> None:
    assert {"secrets", "nested", "failed", "broken"} <= set(lines)
    assert [event for event, line in lines.items() if "pass-word" in json.dumps(line)] == []


def test_an_exception_s_traceback_is_in_the_line(lines: dict[str, dict[str, Any]]) -> None:
    assert "OSError: cannot reach amqp://u:[redacted]@h/" in lines["failed"]["exception"]
    assert "OSError: cannot reach amqp://u:[redacted]@h/" in lines["broken"]["exception"]


def test_a_library_s_line_has_the_same_shape(lines: dict[str, dict[str, Any]]) -> None:
    line = lines["connecting to postgresql://u:[redacted]@h/"]
    assert (line["service"], line["level"], line["logger"]) == ("example", "warning", "a.library")
