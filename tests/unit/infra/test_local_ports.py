"""Ports are chosen once, remembered, and chosen again only when another program took one."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from infra.local.failures import SetupFailed
from infra.local.layout import Layout
from infra.local.ports import PORT_NAMES, ensure_ports, is_port_free, load_ports, plan_ports


@pytest.mark.parametrize(
    ("remembered", "taken", "expected", "moved"),
    [
        ({}, set(), {"http": 8080, "redis": 20_000}, ()),
        ({}, {8080}, {"http": 8081, "redis": 20_000}, (("http", 8080, 8081),)),
        ({"http": 9000, "redis": 20_500}, set(), {"http": 9000, "redis": 20_500}, ()),
        ({"http": 9000, "redis": 20_500}, {9000}, {"http": 8080, "redis": 20_500}, (("http", 9000, 8080),)),
        (
            {"http": 9000, "redis": 20_500},
            {20_500},
            {"http": 9000, "redis": 20_000},
            (("redis", 20_500, 20_000),),
        ),
        ({"http": 20_000}, set(), {"http": 20_000, "redis": 20_001}, ()),
        ({"http": 7, "redis": 7}, set(), {"http": 7, "redis": 20_000}, (("redis", 7, 20_000),)),
    ],
)
def test_plan_ports(
    remembered: dict[str, int],
    taken: set[int],
    expected: dict[str, int],
    moved: tuple[tuple[str, int, int], ...],
) -> None:
    plan = plan_ports(["http", "redis"], remembered, {"http": 8080}, 20_000, lambda port: port not in taken)
    assert plan == (expected, moved)


def test_plan_ports_says_so_when_all_are_taken() -> None:
    with pytest.raises(SetupFailed, match="no free port"):
        plan_ports(["redis"], {}, {}, 32_000, lambda port: False)


def test_a_port_with_a_listener_is_not_free_on_whatever_address_it_listens() -> None:
    for address in ("127.0.0.1", "0.0.0.0"):
        with socket.create_server((address, 0)) as server:
            assert not is_port_free(server.getsockname()[1])


def test_ports_are_remembered_and_differ_from_each_other(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    first = ensure_ports(layout)
    assert ensure_ports(layout).ports == first.ports == load_ports(layout)
    assert len({getattr(first.ports, name) for name in PORT_NAMES}) == len(PORT_NAMES)


def test_a_taken_port_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    before = ensure_ports(layout).ports
    with socket.create_server(("127.0.0.1", before.redis)):
        plan = ensure_ports(layout)
    assert [name for name, _, _ in plan.moved] == ["redis"]
    assert plan.ports.redis != before.redis and plan.ports.postgres == before.postgres


@pytest.mark.parametrize("content", ["", "{", "[]", '{"redis": 1}'])
def test_a_broken_ports_file_counts_as_none(tmp_path: Path, content: str) -> None:
    layout = Layout(tmp_path)
    layout.ports_file.write_text(content)
    assert load_ports(layout) is None
    ensure_ports(layout)
    assert set(json.loads(layout.ports_file.read_text())) == set(PORT_NAMES)


def test_a_port_that_the_user_insists_on_must_be_free(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(SetupFailed, match=f"port {port} .*is taken"):
            ensure_ports(Layout(tmp_path), http_port=port)
    assert ensure_ports(Layout(tmp_path), http_port=port).ports.gateway_http == port
