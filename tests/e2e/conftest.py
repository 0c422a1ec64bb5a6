"""The whole system as `make up` starts it, once for all tests of this folder, in a home of its own.

It exports its traces to a receiver in this process, so that a test can look at the spans of all services together.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from infra.local.daemon import build
from infra.local.layout import Layout, e2e_layout
from infra.local.leftovers import find_processes
from infra.local.management_api import ManagementApi
from infra.local.servers.postgres import remove_data
from infra.local.start import start_everything
from infra.local.state import AlreadyLocked, exclusive_lock
from infra.local.up import stop
from loadtest.chaos import read_env


@dataclass(frozen=True, slots=True)
class SeenSpan:
    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]


class SpanReceiver:
    """An OTLP/HTTP endpoint that keeps every span it is sent."""

    def __init__(self) -> None:
        self.spans: list[SeenSpan] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def take(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        SeenSpan(
                            service=names["service.name"],
                            name=span.name,
                            trace_id=span.trace_id.hex(),
                            span_id=span.span_id.hex(),
                            parent_id=span.parent_span_id.hex(),
                            attributes={a.key: str(a.value) for a in span.attributes},
                        )
                    )

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass(frozen=True, slots=True)
class System:
    """What a new user has after `make up`, and what an operator can look at."""

    layout: Layout
    url: str
    api_key: str
    admin_key: str
    model: str
    database_url: str
    spans: SpanReceiver

    @property
    def team(self) -> ManagementApi:
        return ManagementApi(self.url, self.api_key)

    @property
    def platform(self) -> ManagementApi:
        return ManagementApi(self.url, self.admin_key)


def forget(layout: Layout) -> None:
    """What an earlier run left: its processes and its data. The demo models stay, they are always the same."""
    stop(layout, quiet=True)
    remove_data(layout.home / "postgres")
    for entry in layout.home.iterdir() if layout.home.exists() else ():
        if entry != layout.models:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@pytest.fixture(scope="session")
def home() -> Iterator[Layout]:
    """The tests' own home. Two runs of one clone would take each other's system away in the middle of it."""
    layout = e2e_layout()
    try:
        with exclusive_lock(layout.home.with_name("e2e.lock")):
            yield layout
    except AlreadyLocked:
        pytest.exit("another run of tests/e2e is at work in this clone: wait for it", returncode=1)


@pytest.fixture(scope="session")
def system(home: Layout) -> Iterator[System]:
    layout = home
    spans = SpanReceiver()
    environ = {
        **os.environ,
        "OTEL_EXPORTER_OTLP_ENDPOINT": spans.url,
        "OTEL_BSP_SCHEDULE_DELAY": "200",  # milliseconds; tests wait for spans
    }
    forget(layout)
    start_everything(layout, environ)
    try:
        env = read_env(layout)
        yield System(
            layout=layout,
            url=env["ROUNDHOUSE_URL"],
            api_key=env["ROUNDHOUSE_API_KEY"],
            admin_key=env["ROUNDHOUSE_ADMIN_KEY"],
            model=env["ROUNDHOUSE_MODEL"],
            database_url=build(layout, "all", environ)[0].database_url,
            spans=spans,
        )
    finally:
        stop(layout, quiet=True)
        spans.close()
        assert find_processes(layout.marker) == []
