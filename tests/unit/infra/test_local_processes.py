"""The process list as data: order, environments, secrets."""

from __future__ import annotations

import importlib.util
import json
import stat
from pathlib import Path

import pytest

from infra.local.credentials import Credentials, ensure_credentials, save_credentials, with_demo_key
from infra.local.failures import SetupFailed
from infra.local.layout import Layout
from infra.local.ports import PORT_NAMES, Ports
from infra.local.process_spec import ProcessSpec, stop_order
from infra.local.processes import base_env, server_specs, service_specs

PORTS = Ports(**{name: 20_000 + index for index, name in enumerate(PORT_NAMES)})
CREDENTIALS = Credentials("pg-hidden", "redis-hidden", "rabbit-hidden", "COOKIE", "sk-rh-admin")


def all_specs(tmp_path: Path, environ: dict[str, str]) -> dict[str, ProcessSpec]:
    layout = Layout(tmp_path)
    addresses, servers = server_specs(layout, PORTS, CREDENTIALS, environ)
    services = service_specs(layout, PORTS, CREDENTIALS, environ, addresses, servers)
    return {spec.name: spec for spec in [*servers, *services]}


def test_services_stop_before_what_they_need(tmp_path: Path) -> None:
    order = stop_order(list(all_specs(tmp_path, {}).values()))
    position = {name: index for index, group in enumerate(order) for name in group}
    chain = ["gateway", "scheduler", "agent", "billing", "rabbitmq", "epmd"]
    assert [position[name] for name in chain] == sorted({position[name] for name in chain})
    assert position["gateway"] < position["batch"] < position["agent"]
    assert all(position["billing"] < position[server] for server in ("postgres", "redis", "rabbitmq"))


def test_a_server_that_the_environment_names_is_used_and_not_started(tmp_path: Path) -> None:
    named = {"DATABASE_URL": "postgresql://u:p@db/x", "REDIS_URL": "redis://r", "AMQP_URL": "amqp://a"}
    specs = all_specs(tmp_path, named)
    assert set(specs) == {"migrations", "gateway", "scheduler", "batch", "agent", "billing", "payments"}
    for spec in [spec for name, spec in specs.items() if name != "payments"]:
        assert {name: spec.env[name] for name in named} == named
        assert "AMQP_MANAGEMENT_URL" not in spec.env


def test_each_process_has_its_own_port_and_only_the_gateway_gets_the_admin_key(tmp_path: Path) -> None:
    specs = all_specs(
        tmp_path, {"ROUNDHOUSE_ADMIN_KEY": "from the shell", "ROUNDHOUSE_API_KEY": "k", "SECRET_OF_MINE": "x"}
    )
    services = [specs[name] for name in ("gateway", "scheduler", "batch", "agent", "billing")]
    assert len({spec.env["OPS_PORT"] for spec in services}) == len(services)
    assert specs["gateway"].env["ROUNDHOUSE_ADMIN_KEY"] == "sk-rh-admin"
    assert specs["gateway"].env["HTTP_PORT"] == str(PORTS.gateway_http)
    for name, spec in specs.items():
        assert ("ROUNDHOUSE_ADMIN_KEY" in spec.env) == (name == "gateway")
        assert "ROUNDHOUSE_API_KEY" not in spec.env and "SECRET_OF_MINE" not in spec.env


def test_the_local_payment_provider_and_the_gateway_know_each_other_and_nobody_else_knows_them(
    tmp_path: Path,
) -> None:
    specs = all_specs(tmp_path, {})
    gateway, payments = specs["gateway"].env, specs["payments"].env
    for name in ("PAYMENTS_API_KEY", "PAYMENTS_WEBHOOK_SECRETS"):
        assert gateway[name] == payments[name] and "sk-rh" not in gateway[name]
        assert [spec.name for spec in specs.values() if name in spec.env] == ["payments", "gateway"]
    assert gateway["PAYMENTS_API_URL"] == f"http://127.0.0.1:{payments['LOCAL_PAYMENTS_PORT']}"
    assert payments["PAYMENTS_WEBHOOK_URL"] == f"http://127.0.0.1:{gateway['HTTP_PORT']}/webhooks/payments"
    assert "DATABASE_URL" not in payments and "AMQP_URL" not in payments


def test_a_real_payment_provider_is_for_the_gateway_alone(tmp_path: Path) -> None:
    specs = all_specs(tmp_path, {"PAYMENTS_API_KEY": "sk_live_x", "PAYMENTS_WEBHOOK_SECRETS": "whsec_x"})
    assert "payments" not in specs
    assert [spec.name for spec in specs.values() if "PAYMENTS_API_KEY" in spec.env] == ["gateway"]
    assert "PAYMENTS_API_URL" not in specs["gateway"].env  # the provider's own


def test_settings_of_the_user_are_passed_on() -> None:
    env = base_env(
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "LOG_LEVEL": "debug", "LC_ALL": "C", "EDITOR": "vi"}
    )
    assert (
        env["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://c"
        and env["LOG_LEVEL"] == "debug"
        and env["LC_ALL"] == "C"
    )
    assert "EDITOR" not in env and env["PATH"]


def test_the_gateway_alone_learns_of_the_machines_proxies(tmp_path: Path) -> None:
    specs = all_specs(tmp_path, {"HTTPS_PROXY": "http://p", "no_proxy": "localhost"})
    assert {name for name, spec in specs.items() if "HTTPS_PROXY" in spec.env or "no_proxy" in spec.env} == {
        "gateway"
    }
    assert (specs["gateway"].env["HTTPS_PROXY"], specs["gateway"].env["no_proxy"]) == (
        "http://p",
        "localhost",
    )


def test_no_secret_is_on_a_command_line_or_in_a_repr(tmp_path: Path) -> None:
    specs = all_specs(tmp_path, {})
    for spec in specs.values():
        assert not any("hidden" in part or "sk-rh" in part for part in spec.command)
        assert "hidden" not in repr(spec)
    assert "hidden" not in repr(CREDENTIALS) and "sk-rh" not in repr(CREDENTIALS)


def test_every_command_that_runs_a_module_of_ours_names_one_that_exists(tmp_path: Path) -> None:
    modules = [spec.command[2] for spec in all_specs(tmp_path, {}).values() if spec.command[1:2] == ("-m",)]
    assert len(modules) == 7
    for module in modules:
        assert importlib.util.find_spec(module) is not None, module


def test_credentials_are_made_once_and_readable_by_the_user_only(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    first = ensure_credentials(layout, servers_have_data=False)
    assert ensure_credentials(layout, servers_have_data=True) == first
    assert stat.S_IMODE(layout.secrets_file.stat().st_mode) == 0o600
    save_credentials(layout, with_demo_key(first, "sk-rh-demo"))
    assert ensure_credentials(layout, servers_have_data=True).demo_key == "sk-rh-demo"
    values = list(json.loads(layout.secrets_file.read_text()).values())
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("content", [None, "", "{}", '{"redis_password": "x"}'])
def test_lost_credentials_of_servers_with_data_are_said_and_not_replaced(
    tmp_path: Path, content: str | None
) -> None:
    layout = Layout(tmp_path)
    if content is not None:
        layout.secrets_file.write_text(content)
    with pytest.raises(SetupFailed, match="make clean"):
        ensure_credentials(layout, servers_have_data=True)
