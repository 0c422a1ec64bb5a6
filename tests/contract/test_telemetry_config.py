"""Prometheus' rules, Grafana's dashboards and the collector's pipelines against what the code exports."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from infra.local.servers import rabbitmq as local_rabbitmq
from shared import topology
from tests.contract import compose_file, exported_metrics
from tests.contract.compose_file import ROOT
from tests.contract.promql import reads

INFRA = ROOT / "infra"
DASHBOARDS = sorted((INFRA / "grafana" / "dashboards").glob("*.json"))

# Of other people's programs; those of RabbitMQ were seen on a running 3.10 node.
FOREIGN_METRICS = {
    *("up", "rabbitmq_alarms_memory_used_watermark", "rabbitmq_alarms_free_disk_space_watermark"),
    *("rabbitmq_detailed_queue_messages", "rabbitmq_detailed_queue_messages_ready"),
    *("rabbitmq_detailed_queue_messages_unacked", "rabbitmq_detailed_queue_consumers"),
    *("rabbitmq_global_messages_received_total", "rabbitmq_global_messages_delivered_total"),
    *("rabbitmq_global_messages_redelivered_total", "rabbitmq_global_messages_unroutable_returned_total"),
    *("rabbitmq_process_resident_memory_bytes", "rabbitmq_resident_memory_limit_bytes"),
    *("rabbitmq_disk_space_available_bytes", "rabbitmq_disk_space_available_limit_bytes"),
}
FOREIGN_LABELS = {"le", "job", "instance", "queue"}


def load_yaml(*parts: str) -> dict[str, Any]:
    loaded = yaml.safe_load(INFRA.joinpath(*parts).read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def alerts() -> list[dict[str, Any]]:
    return [rule for group in load_yaml("prometheus", "alerts.yml")["groups"] for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """(where, expression) of all alerts, panels and dashboard variables."""
    for rule in alerts():
        yield rule["alert"], rule["expr"]
    for path in DASHBOARDS:
        board = json.loads(path.read_text(encoding="utf-8"))
        for panel in panels(board):
            for target in panel["targets"]:
                yield f"{path.stem}: {panel['title']}", target["expr"]
        for variable in board["templating"]["list"]:
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
            yield f"{path.stem}: ${variable['name']}", f"sum by ({label}) ({metric})"


@pytest.fixture(scope="module")
def containers() -> dict[str, dict[str, Any]]:
    found = compose_file.rendered(compose_file.sample_environ())["services"]
    assert isinstance(found, dict)
    return found


# ---- names


def test_the_reader_of_expressions_sees_metrics_and_labels() -> None:
    seen = reads(
        'histogram_quantile(0.9, sum by (le, model) (rate(a_bucket{job="x",m=~"$model"}[5m]))) > 1'
        " or vector(0) unless b_total offset 15m"
    )

    assert seen.metrics == {"a_bucket", "b_total"}
    assert seen.labels == {"le", "model", "job", "m"}
    assert [tuple(matcher) for matcher in seen.matchers] == [("job", "=", "x"), ("m", "=~", "$model")]


def test_names_of_exported_metrics_are_those_of_the_exporter() -> None:
    assert {
        "http_server_request_duration_seconds_bucket",
        "gen_ai_server_time_to_first_token_seconds_count",
        "roundhouse_tokens_total",
        "roundhouse_scheduler_places",
    } <= exported_metrics.exported()


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_it_reads_only_what_is_exported(where: str, expression: str) -> None:
    seen = reads(expression)
    assert seen.metrics, where
    assert seen.metrics - exported_metrics.exported() - FOREIGN_METRICS == set()

    in_code = {re.sub(r"[^A-Za-z0-9]+", "_", text) for text in exported_metrics.strings()}
    assert seen.labels - in_code - FOREIGN_LABELS == set()


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_it_compares_labels_with_values_that_occur(where: str, expression: str) -> None:
    jobs = {job["job_name"] for job in load_yaml("prometheus", "prometheus.yml")["scrape_configs"]}
    queues = {queue.name for queue in topology.STATIC_QUEUES}
    for label, operator, value in reads(expression).matchers:
        if operator in ("=~", "!~") or value == "":
            re.compile(value)
        elif label == "job":
            assert value in jobs | {"roundhouse-worker"}, where  # pushed: the job is the service's name
        elif label == "queue":
            assert value in queues, where
        else:
            assert value in exported_metrics.strings(), where


def test_patterns_of_queues_meet_the_names_that_the_topology_gives() -> None:
    names = {
        "live": [queue.name for pool in (True, False) for queue in topology.job_queues("res_1", pool=pool)],
        "replies": [topology.reply_queue("gw_1").name],
    }
    patterns = {
        m.value for _, expression in expressions() for m in reads(expression).matchers if m.label == "queue"
    }
    regular = {pattern for pattern in patterns if any(character in pattern for character in "*+([")}

    for pattern in regular:
        met = [name for group in names.values() for name in group if re.fullmatch(pattern, name)]
        assert met, f"{pattern} meets no queue"
    live, batch = (next(p for p in regular if word in p) for word in ("live", "[.]batch"))
    for name in names["live"]:
        assert bool(re.fullmatch(live, name)) != bool(re.fullmatch(batch, name)), name


# ---- Prometheus


def test_alerts_say_what_happened_and_what_to_do() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names))
    needed = {
        "DeadLetters",
        "BillingLag",
        "LedgerImbalance",
        "NoLeader",
        "WorkerLost",
        "PriceMissing",
        "OutboxLost",
        "RequestsCut",
    }
    assert needed <= set(names)
    for rule in alerts():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "action"}
        assert all(text.strip() for text in rule["annotations"].values())


def test_every_scraped_address_is_a_container_that_listens_there(
    containers: dict[str, dict[str, Any]],
) -> None:
    collector = load_yaml("otel", "collector.yaml")
    known_ports = {
        "rabbitmq": {"15692"},
        "tempo": {str(load_yaml("otel", "tempo.yaml")["server"]["http_listen_port"])},
        "otel-collector": {
            collector["exporters"]["prometheus"]["endpoint"].split(":")[1],
            str(
                collector["service"]["telemetry"]["metrics"]["readers"][0]["pull"]["exporter"]["prometheus"][
                    "port"
                ]
            ),
        },
    }
    scraped: dict[str, set[str]] = {}
    for job in load_yaml("prometheus", "prometheus.yml")["scrape_configs"]:
        for host, port in (
            target.split(":") for entry in job["static_configs"] for target in entry["targets"]
        ):
            if host == "localhost":
                continue
            scraped.setdefault(host, set()).add(port)
            ports = known_ports.get(host) or {containers[host]["environment"]["OPS_PORT"]}
            assert port in ports, f"{job['job_name']} asks {host}:{port}"
            assert "internal" in containers[host]["networks"]
    with_ops_port = {
        name
        for name, container in containers.items()
        if "OPS_PORT" in container.get("environment", {}) and "profiles" not in container
    }
    assert with_ops_port | set(known_ports) == set(scraped)


def test_rules_are_read_from_where_they_are_mounted(containers: dict[str, dict[str, Any]]) -> None:
    source, target, _ = containers["prometheus"]["volumes"][0].split(":")
    for rule_file in load_yaml("prometheus", "prometheus.yml")["rule_files"]:
        assert rule_file.startswith(f"{target}/")
        assert (ROOT / source / rule_file.removeprefix(f"{target}/")).is_file()
    assert f"--config.file={target}/prometheus.yml" in containers["prometheus"]["command"]


def test_rabbitmq_is_asked_for_the_families_that_hold_what_is_read() -> None:
    jobs = {job["job_name"]: job for job in load_yaml("prometheus", "prometheus.yml")["scrape_configs"]}
    assert jobs["rabbitmq-queues"]["params"] == {
        "family": ["queue_coarse_metrics", "queue_consumer_count"],
        "vhost": ["roundhouse"],
    }


# ---- Grafana


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_whole(path: Any) -> None:
    board = json.loads(path.read_text(encoding="utf-8"))
    sources = {
        source["uid"]
        for source in load_yaml("grafana", "provisioning", "datasources", "datasources.yaml")["datasources"]
    }
    variables = {variable["name"] for variable in board["templating"]["list"]}
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        box = panel["gridPos"]
        cells = {(box["x"] + x, box["y"] + y) for x in range(box["w"]) for y in range(box["h"])}
        assert not cells & taken and box["x"] + box["w"] <= 24, f"{panel['title']} lies on another panel"
        taken |= cells
    for panel in panels(board):
        assert panel["title"] and panel["targets"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] in sources
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables, panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_dashboards_have_names_of_their_own_and_show_what_matters() -> None:
    boards = [json.loads(path.read_text(encoding="utf-8")) for path in DASHBOARDS]
    assert (
        len({board["uid"] for board in boards})
        == len({board["title"] for board in boards})
        == len(boards)
        == 2
    )
    shown = {panel["title"] for board in boards for panel in panels(board)}
    assert {"Generation requests: latency", "Time to first token", "Queue wait", "Live GPUs"} <= shown


def test_grafana_finds_what_is_provisioned(containers: dict[str, dict[str, Any]]) -> None:
    mounts = {volume.split(":")[1]: volume.split(":")[0] for volume in containers["grafana"]["volumes"]}
    assert (ROOT / mounts["/etc/grafana/provisioning"] / "datasources").is_dir()
    (provider,) = load_yaml("grafana", "provisioning", "dashboards", "dashboards.yaml")["providers"]
    folder = ROOT / mounts[provider["options"]["path"]]
    home = containers["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (folder / home.removeprefix(provider["options"]["path"] + "/")).is_file()
    tempo_port = load_yaml("otel", "tempo.yaml")["server"]["http_listen_port"]
    ports = {"prometheus": 9090, "tempo": tempo_port}
    for source in load_yaml("grafana", "provisioning", "datasources", "datasources.yaml")["datasources"]:
        address = urllib.parse.urlsplit(source["url"])
        assert address.port == ports[str(address.hostname)]
        assert str(address.hostname) in containers


# ---- the collector, Tempo and RabbitMQ


def test_each_pipeline_uses_declared_parts_and_each_part_is_used() -> None:
    collector = load_yaml("otel", "collector.yaml")
    for section in ("receivers", "processors", "exporters"):
        used = {name for pipeline in collector["service"]["pipelines"].values() for name in pipeline[section]}
        assert used == set(collector[section]), section
    for pipeline in collector["service"]["pipelines"].values():
        assert pipeline["processors"][0] == "memory_limiter"


def test_spans_and_pushed_metrics_go_where_the_collector_and_tempo_listen(
    containers: dict[str, dict[str, Any]],
) -> None:
    collector = load_yaml("otel", "collector.yaml")
    listening = int(collector["receivers"]["otlp"]["protocols"]["http"]["endpoint"].rsplit(":", 1)[1])
    sent_to = {
        (name, variable): urllib.parse.urlsplit(value)
        for name, container in containers.items()
        for variable, value in container.get("environment", {}).items()
        if variable.startswith("OTEL_EXPORTER_OTLP")
    }
    assert {address.netloc for address in sent_to.values()} == {f"otel-collector:{listening}"}
    assert {name for name, variable in sent_to if variable == "OTEL_EXPORTER_OTLP_ENDPOINT"} == {
        *("gateway", "scheduler", "batch", "billing", "agent", "agent-gpu")
    }
    # Others are scraped: what is both pushed and scraped would count twice.
    pushing = {name: address.path for (name, variable), address in sent_to.items() if "METRICS" in variable}
    assert pushing == {"agent": "/v1/metrics", "agent-gpu": "/v1/metrics"}
    tempo = load_yaml("otel", "tempo.yaml")["distributor"]["receivers"]["otlp"]["protocols"]["grpc"][
        "endpoint"
    ]
    assert collector["exporters"]["otlp"]["endpoint"] == f"tempo:{tempo.rsplit(':', 1)[1]}"


def test_the_broker_is_set_up_as_in_local_mode_where_it_matters() -> None:
    lines = (INFRA / "rabbitmq" / "rabbitmq.conf").read_text(encoding="utf-8").splitlines()
    settings = dict(line.split(" = ") for line in lines if line and not line.startswith("#"))
    plugins = (INFRA / "rabbitmq" / "enabled_plugins").read_text(encoding="utf-8")

    assert int(settings["consumer_timeout"]) == local_rabbitmq.CONSUMER_TIMEOUT_S * 1000
    assert re.fullmatch(r"\[(\w+(?:,\w+)*)\]\.\n", plugins)[1].split(",") == list(local_rabbitmq.PLUGINS)  # type: ignore[index]
    # The user, its password and the vhost come from the environment.
    assert not [name for name in settings if name.startswith(("default_", "listeners"))]


# ---- pushing


PUSHER = """
from shared import telemetry
telemetry.setup("worker")
telemetry.meter().create_counter(telemetry.TOKENS, unit="{token}").add(7, {"direction": "output"})
telemetry.meter().create_histogram("roundhouse.some.duration", unit="s").record(0.02)
telemetry.shutdown()
"""


def push(environment: dict[str, str]) -> list[tuple[str, bytes]]:
    """What a process that counts seven tokens sends to the collector."""
    received: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        subprocess.run(
            [sys.executable, "-c", PUSHER],
            cwd=ROOT,
            env={
                "PATH": os.environ["PATH"],
                "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
                **{name: value.format(collector=address) for name, value in environment.items()},
            },
            check=True,
            timeout=60,
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    return received


def test_a_process_pushes_its_metrics_where_it_is_told_to_and_its_last_ones_at_its_end() -> None:
    received = push({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "{collector}/v1/metrics"})

    assert [path for path, _ in received] == ["/v1/metrics"]
    (resource,) = ExportMetricsServiceRequest.FromString(received[0][1]).resource_metrics
    attributes = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert attributes["service.name"] == "roundhouse-worker"
    tokens, duration = sorted(resource.scope_metrics[0].metrics, key=lambda metric: metric.name, reverse=True)
    assert tokens.name == "roundhouse.tokens"
    assert [point.as_int for point in tokens.sum.data_points] == [7]
    # In seconds, as our durations are: the default buckets begin at 5.
    (point,) = duration.histogram.data_points
    assert [bound for bound in point.explicit_bounds if bound < 0.02] != []


def test_a_process_that_is_scraped_does_not_push_its_metrics_as_well() -> None:
    assert push({"OTEL_EXPORTER_OTLP_ENDPOINT": "{collector}"}) == []
