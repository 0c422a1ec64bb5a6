"""Loopback ports of one clone: chosen once, remembered in `ports.json`, chosen again only when another program took one."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

from infra.local.failures import SetupFailed
from infra.local.layout import Layout, write_private

LOOPBACK = "127.0.0.1"
PREFERRED_HTTP_PORT = 8080
LAST_PORT = 32_767  # Linux hands out ports for outgoing connections from 32768 on


@dataclass(frozen=True, slots=True)
class Ports:
    """Every listening port; the field's name says who listens. All on loopback."""

    gateway_http: int
    gateway_ops: int
    scheduler_ops: int
    billing_ops: int
    batch_ops: int
    agent_ops: int
    payments_http: int
    payments_ops: int
    postgres: int
    redis: int
    epmd: int
    rabbitmq_amqp: int
    rabbitmq_distribution: int
    rabbitmq_management: int
    rabbitmq_prometheus: int


PORT_NAMES = tuple(field.name for field in fields(Ports))


@dataclass(frozen=True, slots=True)
class PortPlan:
    ports: Ports
    moved: tuple[tuple[str, int, int], ...]  # name, the port it had or preferred, the port it has now


def plan_ports(
    names: Iterable[str],
    remembered: Mapping[str, int],
    preferred: Mapping[str, int],
    base: int,
    is_free: Callable[[int], bool],
) -> tuple[dict[str, int], tuple[tuple[str, int, int], ...]]:
    """Give each name a port; returns them, and those that could not have the port they had or prefer.

    1. The remembered port, if free.
    2. Otherwise the preferred one, if free.
    3. Otherwise the first free port from the base on (a preferred one: from the port after it on).
    No port is given twice. Raises SetupFailed when the range is exhausted.
    """
    given: dict[str, int] = {}
    moved: list[tuple[str, int, int]] = []
    reserved = set(remembered.values())
    for name in names:
        wishes = [port for port in (remembered.get(name), preferred.get(name)) if port is not None]
        port = next((wish for wish in wishes if wish not in given.values() and is_free(wish)), None)
        if port is None:
            start = preferred[name] + 1 if name in preferred else base
            unavailable = reserved | set(given.values())
            port = next((p for p in range(start, LAST_PORT) if p not in unavailable and is_free(p)), None)
            if port is None:
                raise SetupFailed(
                    f"no free port from {start} to {LAST_PORT}: end some programs and run it again"
                )
        if wishes and port != wishes[0]:
            moved.append((name, wishes[0], port))
        given[name] = port
    return given, tuple(moved)


def is_port_free(port: int) -> bool:
    """Whether nobody listens there on any address (a program on 0.0.0.0 also takes our loopback port)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a port whose old connections linger (TIME_WAIT) counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def load_ports(layout: Layout) -> Ports | None:
    """The remembered ports, or None if there are none, or the file is of another version or broken."""
    try:
        stored = json.loads(layout.ports_file.read_text())
        return Ports(**{name: int(stored[name]) for name in PORT_NAMES})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def ensure_ports(layout: Layout, *, http_port: int | None = None) -> PortPlan:
    """Choose and remember. Call it only while nothing of this clone runs: its own ports would look taken.

    http_port: the gateway's, if the user insists on one; taken, it is an error, since the user would look there.
    """
    known = load_ports(layout)
    remembered = {name: getattr(known, name) for name in PORT_NAMES} if known else {}
    if http_port is not None:
        if not is_port_free(http_port):
            raise SetupFailed(
                f"port {http_port} (ROUNDHOUSE_HTTP_PORT) is taken by another program: end it, or name another port"
            )
        remembered["gateway_http"] = http_port
    given, moved = plan_ports(
        PORT_NAMES, remembered, {"gateway_http": PREFERRED_HTTP_PORT}, layout.port_base, is_port_free
    )
    write_private(layout.ports_file, json.dumps(given, indent=2) + "\n")
    return PortPlan(Ports(**given), moved)
