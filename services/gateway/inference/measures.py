"""One request's share of the metrics and of its span: model, tokens and times, never text."""

from __future__ import annotations

import time
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.metrics import Meter

from shared import telemetry
from shared.inference.principal import ModelView, Principal, Route


class InferenceMetrics:
    """The instruments; one per process."""

    def __init__(self, meter: Meter) -> None:
        self.duration_s = meter.create_histogram(
            telemetry.REQUEST_DURATION, unit="s", description="Duration of generation requests"
        )
        self.first_token_s = meter.create_histogram(
            telemetry.TIME_TO_FIRST_TOKEN, unit="s", description="Time to the first token"
        )
        self.per_token_s = meter.create_histogram(
            telemetry.TIME_PER_OUTPUT_TOKEN, unit="s", description="Time per output token after the first"
        )
        self.tokens = meter.create_counter(
            telemetry.TOKENS, unit="{token}", description="Tokens of finished requests"
        )


class Measure:
    """Watches one request, from its parsed body to its end. The span is the edge's, current while the handler runs."""

    def __init__(
        self,
        metrics: InferenceMetrics,
        operation: str,
        principal: Principal,
        model: ModelView,
        route: Route,
    ) -> None:
        self._metrics = metrics
        self._started_s = time.perf_counter()
        self._first_token_s: float | None = None
        self._last_token_s = 0.0
        self._attributes = {
            telemetry.GEN_AI_OPERATION: operation,
            telemetry.GEN_AI_PROVIDER: "roundhouse",
            telemetry.GEN_AI_REQUEST_MODEL: model.full_name,
            telemetry.RESOURCE_ID: route.resource.resource_id,
        }
        self._span = trace.get_current_span()
        self._span.set_attributes({**self._attributes, telemetry.TEAM_ID: principal.team_id})

    def planned(self, max_tokens: int | None, prompt_tokens: int, job_ids: Sequence[str]) -> None:
        """max_tokens: None where there is no answer to limit."""
        if max_tokens is not None:
            self._span.set_attribute(telemetry.GEN_AI_MAX_TOKENS, max_tokens)
        self._span.set_attribute(telemetry.GEN_AI_INPUT_TOKENS, prompt_tokens)
        self._span.set_attribute(telemetry.JOB_ID, job_ids[0] if len(job_ids) == 1 else list(job_ids))

    def saw_tokens(self) -> None:
        self._last_token_s = time.perf_counter()
        if self._first_token_s is None:
            self._first_token_s = self._last_token_s
            self._metrics.first_token_s.record(self._last_token_s - self._started_s, self._attributes)

    def succeeded(self, prompt_tokens: int, completion_tokens: int, finish_reasons: Sequence[str]) -> None:
        self._span.set_attribute(telemetry.GEN_AI_OUTPUT_TOKENS, completion_tokens)
        self._span.set_attribute(telemetry.GEN_AI_FINISH_REASONS, list(finish_reasons))
        if self._first_token_s is not None and completion_tokens > 1:
            between_s = (self._last_token_s - self._first_token_s) / (completion_tokens - 1)
            self._metrics.per_token_s.record(between_s, self._attributes)
        self._metrics.tokens.add(prompt_tokens, {**self._attributes, "direction": "input"})
        self._metrics.tokens.add(completion_tokens, {**self._attributes, "direction": "output"})
        self._metrics.duration_s.record(self.elapsed_s(), self._attributes)

    def failed(self, error_type: str) -> None:
        """`error_type`: an error code, or "client_gone"."""
        self._span.set_attribute(telemetry.ERROR_TYPE, error_type)
        self._metrics.duration_s.record(
            self.elapsed_s(), {**self._attributes, telemetry.ERROR_TYPE: error_type}
        )

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started_s
