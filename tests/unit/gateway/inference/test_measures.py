from __future__ import annotations

from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider

from services.gateway.inference.measures import InferenceMetrics, Measure
from shared.inference.parameters import parse_completion
from tests.unit.gateway.inference.builders import make_model, make_principal, make_route

SECRET = "a very private prompt"


def measured(*, succeeds: bool) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The span's attributes, and each metric's data points."""
    reader = InMemoryMetricReader()
    metrics = InferenceMetrics(MeterProvider([reader]).get_meter("test"))
    wanted = parse_completion({"model": "tiny", "prompt": SECRET}, random_seed=1)
    with TracerProvider().get_tracer("test").start_as_current_span("POST /v1/completions") as span:
        measure = Measure(metrics, wanted.operation, make_principal(), make_model(), make_route())
        measure.planned(16, 21, ["job_1"])
        measure.saw_tokens()
        measure.saw_tokens()
        if succeeds:
            measure.succeeded(21, 5, ["stop"])
        else:
            measure.failed("deadline_exceeded")
    assert isinstance(span, ReadableSpan)
    data = reader.get_metrics_data()
    assert data is not None
    points = {
        metric.name: list(metric.data.data_points)
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    return dict(span.attributes or {}), points


def test_success_is_on_span_and_metrics() -> None:
    attributes, points = measured(succeeds=True)
    assert attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "roundhouse",
        "gen_ai.request.model": "acme/tiny",
        "gen_ai.request.max_tokens": 16,
        "gen_ai.usage.input_tokens": 21,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ("stop",),
        "roundhouse.team.id": "team_1",
        "roundhouse.resource.id": "res_1",
        "roundhouse.job.id": "job_1",
    }
    assert {p.attributes["direction"]: p.value for p in points["roundhouse.tokens"]} == {
        "input": 21,
        "output": 5,
    }
    for name in (
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
    ):
        assert [p.count for p in points[name]] == [1]


def test_failure_is_counted_by_its_code_and_has_no_tokens() -> None:
    attributes, points = measured(succeeds=False)
    assert attributes["error.type"] == "deadline_exceeded"
    (point,) = points["gen_ai.server.request.duration"]
    assert point.attributes["error.type"] == "deadline_exceeded"
    assert "roundhouse.tokens" not in points


def test_no_text_is_recorded() -> None:
    assert SECRET not in repr(measured(succeeds=True)) + repr(measured(succeeds=False))
