"""docker-compose.yml against the Compose Specification, the Dockerfile and the code that it starts.

There is no Docker engine here: no image is built and no container started by these tests.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import opentelemetry.sdk.environment_variables as otel_variables
import pytest

from infra.docker.demo import DemoSettings
from services.batch.settings import BatchSettings
from services.billing.settings import BillingSettings
from services.gateway.settings import GatewaySettings
from services.scheduler.settings import SchedulerSettings
from services.worker.agent.settings import AgentSettings
from services.worker.settings import WorkerSettings
from shared.settings import load
from tests.contract import compose_file
from tests.contract.compose_file import ROOT, seconds

SCHEMA = ROOT / "tests" / "contract" / "data" / "compose-spec.json"

# Each container of ours, with the settings that processes in it read. The first are those of its command.
OURS: dict[str, tuple[type, ...]] = {
    "gateway": (GatewaySettings,),
    "scheduler": (SchedulerSettings,),
    "billing": (BillingSettings,),
    "batch": (BatchSettings,),
    "agent": (AgentSettings, WorkerSettings),
    "agent-gpu": (AgentSettings, WorkerSettings),
    "demo": (DemoSettings,),
}
SERVICES = ("gateway", "scheduler", "batch", "billing", "agent", "agent-gpu")
ONE_SHOTS = ("migrate", "demo")
# Their images hold one program and no shell, so nothing can ask from inside: Prometheus scrapes them (TargetDown).
NOTHING_TO_ASK_WITH = ("otel-collector", "tempo")
SERVER_PORTS = {"amqp": ("rabbitmq", 5672), "postgresql": ("postgres", 5432), "redis": ("redis", 6379)}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return compose_file.rendered(compose_file.sample_environ())


@pytest.fixture(scope="module")
def containers(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = compose["services"]
    assert isinstance(found, dict)
    return found


def environment_of(container: dict[str, Any]) -> dict[str, str]:
    """What is given a value; one without is taken from the shell, if it is set there."""
    return {name: value for name, value in container.get("environment", {}).items() if value is not None}


def known_variables(kinds: tuple[type, ...]) -> set[str]:
    return {field.metadata["variable"] for kind in kinds for field in dataclasses.fields(kind)}


# ---- the specification


def schema_errors(document: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    return [f"{list(error.absolute_path)}: {error.message}" for error in validator.iter_errors(document)]


def test_the_file_is_valid_by_the_compose_specification(compose: dict[str, Any]) -> None:
    assert schema_errors(compose_file.raw()) == []
    assert schema_errors(compose) == []


@pytest.mark.parametrize(
    "change",
    [
        {"comand": ["python"]},
        {"depends_on": {"postgres": {"condition": "service_ready"}}},
        {"healthcheck": {"tests": ["CMD", "true"]}},
    ],
)
def test_the_schema_refuses_what_compose_would(compose: dict[str, Any], change: dict[str, Any]) -> None:
    services = compose["services"]
    broken = {**compose, "services": {**services, "gateway": {**services["gateway"], **change}}}

    assert schema_errors(broken) != []


def test_everything_that_is_referred_to_is_declared(compose: dict[str, Any]) -> None:
    containers = compose["services"]
    used_volumes: set[str] = set()
    for name, container in containers.items():
        assert set(container["networks"]) <= set(compose["networks"]), name
        for other, wanted in container.get("depends_on", {}).items():
            condition = wanted["condition"]
            assert other in containers, f"{name} depends on {other}"
            assert "profiles" not in containers[other] or wanted.get("required") is False, f"{name}: {other}"
            assert condition != "service_healthy" or "healthcheck" in containers[other], f"{name}: {other}"
            assert (condition == "service_completed_successfully") == (other in ONE_SHOTS), f"{name}: {other}"
        for volume in container.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).exists(), f"{name} mounts {source}"
                assert volume.endswith(":ro"), f"{name} may write to {source}"
            else:
                used_volumes.add(source)
    assert used_volumes == set(compose["volumes"])


# ---- variables and secrets


def test_each_variable_is_in_the_example_or_has_a_default() -> None:
    example = compose_file.ENV_EXAMPLE.read_text(encoding="utf-8")
    given = compose_file.read_env_file(example)
    for name, forms in compose_file.variables().items():
        assert len(forms) == 1, f"{name} is used in different forms: {forms}"
        if forms == {"required"}:
            assert given.get(name) == "", f"{name} must be in .env.example, and empty there"
        else:
            assert forms == {"default"}, f"{name} would be empty without a word"
            assert not re.search("PASSWORD|KEY|SECRET|TOKEN", name), f"{name} has a default"


def test_each_line_of_the_example_is_used() -> None:
    offered = set(
        re.findall(r"^#?([A-Z][A-Z_]+)=", compose_file.ENV_EXAMPLE.read_text(encoding="utf-8"), re.MULTILINE)
    )
    passed_through = {
        name
        for container in compose_file.raw()["services"].values()
        for name, value in container.get("environment", {}).items()
        if value is None
    }
    assert offered <= set(compose_file.variables()) | passed_through | {"COMPOSE_PROFILES"}


@pytest.mark.parametrize(
    "secret", [n for n, forms in compose_file.variables().items() if forms == {"required"}]
)
def test_it_does_not_start_without_a_secret(secret: str) -> None:
    with pytest.raises(compose_file.MissingVariable, match=secret):
        compose_file.rendered({**compose_file.sample_environ(), secret: ""})


def test_new_env_fills_in_fresh_secrets_once(tmp_path: Path) -> None:
    script = tmp_path / "infra" / "docker" / "new-env.sh"
    script.parent.mkdir(parents=True)
    script.write_bytes((ROOT / "infra" / "docker" / "new-env.sh").read_bytes())
    (tmp_path / ".env.example").write_bytes(compose_file.ENV_EXAMPLE.read_bytes())

    subprocess.run(["sh", str(script)], check=True, cwd="/")
    first = (tmp_path / ".env").read_text()
    subprocess.run(["sh", str(script)], check=True, cwd="/")

    assert (tmp_path / ".env").read_text() == first
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0
    values = compose_file.read_env_file(first)
    assert values.keys() == compose_file.read_env_file(compose_file.ENV_EXAMPLE.read_text()).keys()
    secrets = [value for name, value in values.items() if "PASSWORD" in name or "KEY" in name]
    assert len(set(secrets)) == len(secrets) == 5
    # They become parts of URLs, where other characters would have to be quoted.
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{43,}", secret) for secret in secrets)
    assert re.fullmatch(r"sk-rh-[A-Za-z0-9_-]{43}", values["ROUNDHOUSE_ADMIN_KEY"])
    compose_file.rendered(values)


def test_secrets_are_neither_committed_nor_sent_to_the_builder() -> None:
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"


# ---- commands and their settings


@pytest.mark.parametrize("name", OURS)
def test_each_container_is_given_all_that_its_settings_need_and_nothing_unknown(
    containers: dict[str, dict[str, Any]], name: str
) -> None:
    environment = environment_of(containers[name])
    otel = {value for key, value in vars(otel_variables).items() if key.isupper()}

    load(OURS[name][0], environment)  # raises for a missing or bad one

    unknown = set(environment) - known_variables(OURS[name]) - otel
    assert not unknown, f"{name} sets what nothing in it reads"


@pytest.mark.parametrize("name", ["agent", "agent-gpu"])
def test_workers_find_their_settings_in_their_agents_environment(
    containers: dict[str, dict[str, Any]], name: str
) -> None:
    told_by_agent = {"ROUNDHOUSE_WORKER_SPEC": "{}", "OPS_PORT": "0"}

    settings = load(WorkerSettings, environment_of(containers[name]) | told_by_agent)

    assert str(settings.model_store) in {volume.split(":")[1] for volume in containers[name]["volumes"]}


def test_no_worker_can_reach_the_database(containers: dict[str, dict[str, Any]]) -> None:
    for name in ("agent", "agent-gpu"):
        assert not {"DATABASE_URL", "REDIS_URL", "ROUNDHOUSE_ADMIN_KEY"} & set(
            containers[name]["environment"]
        )


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_starts_by_its_command_and_accepts_its_settings(
    containers: dict[str, dict[str, Any]], name: str
) -> None:
    """Runs the real command up to where it would connect; without torch where the image has none."""
    python, dash_m, module = containers[name]["command"]
    assert (python, dash_m) == ("python", "-m")
    no_torch = "sys.modules['torch'] = None; " if containers[name]["build"]["target"] == "base" else ""
    program = (
        f"import runpy, sys; {no_torch}sys.argv = [{module!r}, '--check-settings']; "
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment_of(containers[name])},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (done.returncode, done.stdout.strip().endswith("settings are good")) == (0, True), done.stderr


def test_migrations_and_demo_are_commands(containers: dict[str, dict[str, Any]]) -> None:
    for name in ONE_SHOTS:
        module = containers[name]["command"][2]
        source = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
        assert 'if __name__ == "__main__":' in source
    asked = subprocess.run(
        [sys.executable, "-m", "infra.migrate"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert containers["migrate"]["command"][3] in asked.stderr.split()[-1].split("|")
    assert set(environment_of(containers["migrate"])) == {"DATABASE_URL"}


@pytest.mark.parametrize("name", [*SERVICES, "migrate"])
def test_addresses_lead_to_the_servers_with_their_own_credentials(
    containers: dict[str, dict[str, Any]], name: str
) -> None:
    accepted = {
        "amqp": [
            containers["rabbitmq"]["environment"][f"RABBITMQ_DEFAULT_{part}"]
            for part in ("USER", "PASS", "VHOST")
        ],
        "postgresql": [
            containers["postgres"]["environment"][f"POSTGRES_{part}"] for part in ("USER", "PASSWORD", "DB")
        ],
        "redis": ["", containers["redis"]["command"][-1], "0"],
    }
    environment = environment_of(containers[name])
    urls = [
        environment[variable]
        for variable in ("AMQP_URL", "DATABASE_URL", "REDIS_URL")
        if variable in environment
    ]
    assert urls
    for url in map(urllib.parse.urlsplit, urls):
        assert (url.hostname, url.port) == SERVER_PORTS[url.scheme]
        assert [url.username, url.password, url.path.removeprefix("/")] == accepted[url.scheme]
        assert set(containers[str(url.hostname)]["networks"]) & set(containers[name]["networks"])
    assert containers["redis"]["environment"]["REDISCLI_AUTH"] == accepted["redis"][1]


# ---- life: health, order, restarts, ports


def served_by_the_ops_port() -> set[str]:
    """The paths in `shared/runtime.py`."""
    tree = ast.parse((ROOT / "shared" / "runtime.py").read_text(encoding="utf-8"))
    return {
        str(node.args[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "get"
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and str(node.args[0].value).startswith("/")
    }


def test_each_container_restarts_and_tells_its_health(containers: dict[str, dict[str, Any]]) -> None:
    assert set(ONE_SHOTS) | set(SERVICES) | set(NOTHING_TO_ASK_WITH) <= set(containers)
    for name, container in containers.items():
        if name in ONE_SHOTS:
            assert container["restart"] == "no", name
            continue
        assert container["restart"] == "unless-stopped", name
        assert ("healthcheck" in container) == (name not in NOTHING_TO_ASK_WITH), name


@pytest.mark.parametrize("name", SERVICES)
def test_health_checks_of_services_ask_what_they_serve(
    containers: dict[str, dict[str, Any]], name: str
) -> None:
    check = containers[name]["healthcheck"]
    assert check["test"][:4] == ["CMD", "python", "-m", "infra.docker.probe"]
    assert check["test"][4] in served_by_the_ops_port()
    # The probe gives up by itself, and says why, before Docker kills it.
    from infra.docker.probe import TIMEOUT_S

    assert TIMEOUT_S < seconds(check["timeout"]) < seconds(check["interval"])


def test_services_are_given_longer_to_stop_than_they_drain(containers: dict[str, dict[str, Any]]) -> None:
    for name in SERVICES:
        drain_s = float(environment_of(containers[name])["DRAIN_TIMEOUT_S"])
        assert seconds(containers[name]["stop_grace_period"]) >= drain_s + 10, name


def test_containers_stop_in_the_order_in_which_they_need_each_other(
    containers: dict[str, dict[str, Any]],
) -> None:
    def needs(name: str) -> set[str]:
        direct = set(containers[name].get("depends_on", {}))
        return direct.union(*(needs(other) for other in direct))

    order = ("gateway", "scheduler", "agent", "billing", "postgres")
    for index, name in enumerate(order):
        assert set(order[index + 1 :]) <= needs(name), name
        assert "rabbitmq" in needs(name) or name == "postgres"
    assert "agent-gpu" in needs("scheduler")
    assert {"agent", "agent-gpu", "billing"} <= needs("batch") and "batch" in needs("gateway")


def test_only_what_people_and_teams_speak_to_is_published_and_only_on_loopback(
    compose: dict[str, Any],
) -> None:
    containers = compose["services"]
    published = {name: container["ports"] for name, container in containers.items() if "ports" in container}
    assert set(published) == {"gateway", "grafana", "rabbitmq"}
    targets = {}
    for name, (port,) in published.items():
        address, _, target = port.split(":")
        assert address == "127.0.0.1"
        targets[name] = target
        assert "edge" in containers[name]["networks"]  # nothing is published from an internal network
    assert targets["gateway"] == environment_of(containers["gateway"])["HTTP_PORT"]
    assert targets["grafana"] == "3000"
    assert targets["rabbitmq"] == "5672"  # AMQP alone: the management API stays inside
    shown = urllib.parse.urlsplit(environment_of(containers["gateway"])["TEAMS_AMQP_ADDRESS"])
    assert published["rabbitmq"] == [f"{shown.hostname}:{shown.port}:5672"]
    assert compose["networks"]["internal"]["internal"] is True
    outside = {name for name, container in containers.items() if container["networks"] != ["internal"]}
    assert outside == {"gateway", "grafana", "demo", "rabbitmq"}


def test_services_listen_where_other_containers_reach_them(containers: dict[str, dict[str, Any]]) -> None:
    for name in SERVICES:
        assert environment_of(containers[name])["OPS_HOST"] == "0.0.0.0", name
    assert environment_of(containers["gateway"])["HTTP_HOST"] == "0.0.0.0"
    gateway = urllib.parse.urlsplit(environment_of(containers["demo"])["ROUNDHOUSE_URL"])
    assert (gateway.hostname, str(gateway.port)) == (
        "gateway",
        environment_of(containers["gateway"])["HTTP_PORT"],
    )
    assert (
        environment_of(containers["demo"])["PUBLIC_URL"]
        == environment_of(containers["gateway"])["PUBLIC_URL"]
    )


def test_only_the_gpu_agent_asks_for_gpus_and_only_in_its_profile(
    containers: dict[str, dict[str, Any]],
) -> None:
    assert [name for name, container in containers.items() if "profiles" in container] == ["agent-gpu"]
    (device,) = containers["agent-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    # `utility` brings nvidia-smi, which the agent counts the GPUs by.
    assert {"gpu", "compute", "utility"} == set(device["capabilities"])
    ids = [environment_of(containers[name])["ROUNDHOUSE_NODE_ID"] for name in ("agent", "agent-gpu")]
    assert len(set(ids)) == 2
    assert all(containers[name]["init"] for name in SERVICES)


# ---- images


def test_images_have_explicit_tags(containers: dict[str, dict[str, Any]]) -> None:
    for name, container in containers.items():
        image, _, tag = container["image"].partition(":")
        if "build" in container:
            assert (image, tag) == ("roundhouse", container["build"]["target"]), name
        else:
            assert re.match(r"v?\d+(\.\d+)*(-[a-z]+)?$", tag), f"{name}: {container['image']}"
            assert image.count("/") <= 1 and "." not in image.split("/")[0], f"{name} names a registry"
