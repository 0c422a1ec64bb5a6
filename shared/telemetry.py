"""Traces, metrics and logs: set up once per process, entered and left in one place per message or request.

All names of attributes and metrics live here, since the GenAI conventions are still being renamed. Prompts, answers,
API keys and URLs with passwords never reach a log line or a span.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import structlog
from opentelemetry import context, metrics, propagate, trace
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

# Span attributes (OpenTelemetry semantic conventions, "Development" status unless HTTP).
MESSAGING_SYSTEM = "messaging.system"
MESSAGING_DESTINATION = "messaging.destination.name"
MESSAGING_OPERATION = "messaging.operation.name"
GEN_AI_OPERATION = "gen_ai.operation.name"
GEN_AI_PROVIDER = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_MAX_TOKENS = "gen_ai.request.max_tokens"
GEN_AI_INPUT_TOKENS = "gen_ai.usage.input_tokens"
GEN_AI_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
GEN_AI_FINISH_REASONS = "gen_ai.response.finish_reasons"
ERROR_TYPE = "error.type"
JOB_ID = "roundhouse.job.id"
TEAM_ID = "roundhouse.team.id"
RESOURCE_ID = "roundhouse.resource.id"
ATTEMPT = "roundhouse.job.attempt"
SWAP_NEEDED = "roundhouse.swap.needed"
PAUSES = "roundhouse.job.pauses"
PAUSED_MS = "roundhouse.job.paused_ms"
TRANSACTION_ID = "roundhouse.ledger.transaction.id"

# Metrics.
HTTP_DURATION = "http.server.request.duration"
REQUEST_DURATION = "gen_ai.server.request.duration"
TIME_TO_FIRST_TOKEN = "gen_ai.server.time_to_first_token"
TIME_PER_OUTPUT_TOKEN = "gen_ai.server.time_per_output_token"
TOKENS = "roundhouse.tokens"
QUEUE_WAIT = "roundhouse.queue.wait"
SWAP_DURATION = "roundhouse.swap.duration"
BUSY = "roundhouse.worker.busy"
DEAD_LETTERS = "roundhouse.dead_letters"

_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

_METRICS_PUSH_MS = 15_000  # as often as Prometheus looks

_propagator = TraceContextTextMapPropagator()
_SECRETS = re.compile(
    r"(sk-[A-Za-z0-9_]{4})[A-Za-z0-9_-]+|(://[^/:@\s]*:)[^@/\s]+(@)|(Bearer\s+)\S+", re.IGNORECASE
)


def setup(service: str, *, log_level: str = "INFO") -> None:
    """Configure logging, tracing and metrics for this process. Called once by `shared.runtime`."""
    _setup_logging(service, log_level)
    # Process numbers alone are the same in many containers.
    instance = f"{socket.gethostname()}:{os.getpid()}"
    resource = Resource.create({"service.name": f"roundhouse-{service}", "service.instance.id": instance})
    exporting = (
        "OTEL_EXPORTER_OTLP_ENDPOINT" in os.environ or "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT" in os.environ
    )
    # Without a collector spans are not recorded, but logs and ledger rows still carry the trace's id.
    provider = TracerProvider(resource=resource) if exporting else TracerProvider(ALWAYS_OFF, resource)
    if exporting:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    propagate.set_global_textmap(_propagator)
    views = [
        View(instrument_name=name, aggregation=ExplicitBucketHistogramAggregation(buckets))
        for name, buckets in (
            (HTTP_DURATION, _REQUEST_BUCKETS_S),
            (REQUEST_DURATION, _REQUEST_BUCKETS_S),
            (TIME_TO_FIRST_TOKEN, _REQUEST_BUCKETS_S),
            (TIME_PER_OUTPUT_TOKEN, _TOKEN_BUCKETS_S),
        )
    ]
    # Our own durations: the default buckets are made for milliseconds.
    own = ExplicitBucketHistogramAggregation(_REQUEST_BUCKETS_S)
    views.append(View(Histogram, instrument_name="roundhouse.*", instrument_unit="s", aggregation=own))
    readers: list[MetricReader] = [PrometheusMetricReader()]
    # Only where it is asked for by its own name: a process with a known ops port is scraped, and pushing its metrics as
    # well would count them twice. Workers have no such port.
    if os.environ.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"):
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

        readers.append(
            PeriodicExportingMetricReader(OTLPMetricExporter(), export_interval_millis=_METRICS_PUSH_MS)
        )
    metrics.set_meter_provider(MeterProvider(resource=resource, metric_readers=readers, views=views))


def shutdown() -> None:
    """Flush and close the exporters; bounded by their own time-outs."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.force_flush(3000)
        provider.shutdown()
    meters = metrics.get_meter_provider()
    if isinstance(meters, MeterProvider):
        meters.shutdown(3000)


def meter() -> metrics.Meter:
    return metrics.get_meter("roundhouse")


_tracer = trace.get_tracer("roundhouse")  # a proxy until `setup` has run


def tracer() -> trace.Tracer:
    return _tracer


def _is_unrecorded(span: Span) -> bool:
    """Whether it belongs to a trace that was begun without being recorded, here or by whoever sent it."""
    found = span.get_span_context()
    return found.is_valid and not found.trace_flags.sampled


@contextmanager
def span(
    name: str, *, kind: SpanKind = SpanKind.INTERNAL, attributes: Mapping[str, AttributeValue] | None = None
) -> Iterator[Span]:
    """A span around the body; an exception marks it as an error by its type, without its text.

    In a trace that is not recorded it is the current span again: another one would cost and show nothing.
    """
    around = trace.get_current_span()
    if _is_unrecorded(around):
        yield around
        return
    with tracer().start_as_current_span(
        name, kind=kind, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield current
        except BaseException as error:
            current.set_attribute(ERROR_TYPE, type(error).__name__)
            current.set_status(Status(StatusCode.ERROR))
            raise


def start_span_under(
    name: str, headers: Mapping[str, Any], *, attributes: Mapping[str, AttributeValue] | None = None
) -> Span:
    """Start a CONSUMER span under the trace context found in `headers`; the caller ends it."""
    parent = _propagator.extract(_text_headers(headers))
    if _is_unrecorded(around := trace.get_current_span(parent)):
        return around
    return tracer().start_span(name, context=parent, kind=SpanKind.CONSUMER, attributes=attributes)


def record_child(
    parent: Span,
    name: str,
    start_unix_ns: int,
    end_unix_ns: int,
    attributes: Mapping[str, AttributeValue] | None = None,
) -> None:
    """Record a stage of `parent` that is already over (queue wait, swap, prefill, decode)."""
    if _is_unrecorded(parent):
        return
    under = trace.set_span_in_context(parent)
    done = tracer().start_span(name, context=under, start_time=start_unix_ns, attributes=attributes)
    done.end(end_time=max(end_unix_ns, start_unix_ns))


@contextmanager
def under(parent: Span) -> Iterator[None]:
    """Make `parent` the current span for the body, without ending it."""
    with trace.use_span(parent, end_on_exit=False, record_exception=False, set_status_on_exception=False):
        yield


def inject_headers() -> dict[str, Any]:
    """Return AMQP headers that carry the current trace context (empty without one)."""
    headers: dict[str, Any] = {}
    _propagator.inject(headers)
    return headers


@contextmanager
def remote_context(headers: Mapping[str, Any]) -> Iterator[None]:
    """Make the trace context found in `headers` current; malformed ones start a new trace."""
    token = context.attach(_propagator.extract(_text_headers(headers)))
    try:
        yield
    finally:
        context.detach(token)


def _text_headers(headers: Mapping[str, Any]) -> dict[str, str]:
    return {
        key.lower(): value.decode("latin-1") if isinstance(value, bytes) else str(value)
        for key, value in headers.items()
        if key.lower() in ("traceparent", "tracestate")
    }


def _add_trace_ids(
    _logger: Any, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    current = trace.get_current_span().get_span_context()
    if current.is_valid:
        event["trace_id"] = f"{current.trace_id:032x}"
        event["span_id"] = f"{current.span_id:016x}"
    return event


def redact(text: str) -> str:
    """Return `text` without API keys, bearer tokens and passwords in URLs."""
    return _SECRETS.sub(lambda m: (m[1] or m[2] or m[4] or "") + "[redacted]" + (m[3] or ""), text)


def _redact_event(
    _logger: Any, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    for key, value in event.items():
        if not key.startswith("_"):  # the formatter's own, not for the line
            event[key] = _redacted(value)
    return event


def _redacted(value: Any) -> Any:
    match value:
        case str():
            return redact(value)
        case None | bool() | int() | float():
            return value
        case Mapping():
            return {redact(str(key)): _redacted(each) for key, each in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_redacted(each) for each in value]
        case _:
            return redact(repr(value))  # as the JSON renderer would write it


def _setup_logging(service: str, level: str) -> None:
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_trace_ids,
        structlog.processors.format_exc_info,
        _redact_event,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level)),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    # Libraries log through the standard library: same format, warnings and worse only.
    handler = logging.StreamHandler(sys.stderr)
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(),
        ],
        foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
    )
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.WARNING, logging.getLevelName(level)))
    # Six lines for every half second without a broker; `shared.broker` says once that it is away, and when it is back.
    for name in ("aiormq", "aio_pika"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
