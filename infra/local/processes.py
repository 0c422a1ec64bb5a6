"""Every process that `make up` runs, as data: its command, environment, dependencies, probe and deadline."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from infra.local.credentials import Credentials
from infra.local.layout import Layout
from infra.local.payments import gateway_payments_env, payment_specs
from infra.local.ports import Ports
from infra.local.probes import HttpProbe
from infra.local.process_spec import ProcessSpec
from infra.local.servers.postgres import PrivatePostgres
from infra.local.servers.rabbitmq import PrivateRabbit
from infra.local.servers.redis import PrivateRedis

NODE_ID = "local"
# How long a service may finish what it has begun when it is stopped; the user waits for it at `make down`.
DRAIN_TIMEOUT_S = 20.0

# What processes get of the user's environment: what the machine needs and what tunes us; not every secret of a shell.
PASSED_ON = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_*", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LOG_LEVEL"),
    *("OTEL_*", "CUDA_*", "NVIDIA_*", "OMP_*", "MKL_*", "SSL_CERT_*", "PYTHON*", "ROUNDHOUSE_*"),
    *(
        "HTTP_HOST",
        "PUBLIC_URL",
        "ALLOWED_HOSTS",
        "MAX_*",
        "TEAM_*",
        "UPLOAD*",
        "GATEWAY_*",
        "BILLING_*",
        "BATCH_*",
        "TEAMS_*",
        "AWS_*",
        "DRAIN_TIMEOUT_S",
    ),
)
# For the gateway, which alone reaches out of the machine: it may fetch models from a hub.
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
# What `.local/env` sets for clients, if the user's shell has read it: no service may take it for its own.
FOR_CLIENTS = ("ROUNDHOUSE_URL", "ROUNDHOUSE_API_KEY", "ROUNDHOUSE_ADMIN_KEY", "ROUNDHOUSE_MODEL")


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the three servers are: private ones, or those that the environment names."""

    database_url: str = field(repr=False)
    redis_url: str = field(repr=False)
    amqp_url: str = field(repr=False)
    amqp_management_url: str | None = field(repr=False)  # None: a broker of the user's without one

    def env(self) -> dict[str, str]:
        env = {"DATABASE_URL": self.database_url, "REDIS_URL": self.redis_url, "AMQP_URL": self.amqp_url}
        if self.amqp_management_url is not None:
            env["AMQP_MANAGEMENT_URL"] = self.amqp_management_url
        return env


def base_env(environ: Mapping[str, str]) -> dict[str, str]:
    passed = {
        name: value
        for name, value in environ.items()
        if name not in FOR_CLIENTS and any(fnmatchcase(name, pattern) for pattern in PASSED_ON)
    }
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", **passed, "PYTHONUNBUFFERED": "1"}


def server_specs(
    layout: Layout,
    ports: Ports,
    credentials: Credentials,
    environ: Mapping[str, str],
    *,
    durable: bool = True,
) -> tuple[Addresses, list[ProcessSpec]]:
    """The private servers that are needed: none for what the environment names.

    durable: whether PostgreSQL waits for the disk; tests need not.
    """
    env = base_env(environ)
    specs: list[ProcessSpec] = []

    database_url = environ.get("DATABASE_URL")
    if not database_url:
        postgres = PrivatePostgres(
            layout.home / "postgres", ports.postgres, credentials.postgres_password, durable
        )
        database_url = postgres.url
        specs += postgres.specs(env)

    redis_url = environ.get("REDIS_URL")
    if not redis_url:
        redis = PrivateRedis(layout.home / "redis", ports.redis, credentials.redis_password)
        redis_url = redis.url
        specs += redis.specs(env)

    amqp_url, management_url = environ.get("AMQP_URL"), environ.get("AMQP_MANAGEMENT_URL")
    if not amqp_url:
        rabbit = PrivateRabbit(
            folder=layout.home / "rabbitmq",
            amqp_port=ports.rabbitmq_amqp,
            management_port=ports.rabbitmq_management,
            prometheus_port=ports.rabbitmq_prometheus,
            epmd_port=ports.epmd,
            distribution_port=ports.rabbitmq_distribution,
            password=credentials.rabbitmq_password,
            cookie=credentials.erlang_cookie,
        )
        amqp_url, management_url = rabbit.url, rabbit.management_url
        specs += rabbit.specs(env)

    return Addresses(database_url, redis_url, amqp_url, management_url or None), specs


def service_specs(
    layout: Layout,
    ports: Ports,
    credentials: Credentials,
    environ: Mapping[str, str],
    addresses: Addresses,
    servers: list[ProcessSpec],
) -> list[ProcessSpec]:
    """Migrations, then the services.

    Stopped in this order: gateway (finishes what it has accepted, which needs the workers), batch (what it has out runs
    again later) and scheduler (so that it starts no worker for one that leaves), node agent with its workers, billing
    (books the last events), servers.
    """
    common = {
        "DRAIN_TIMEOUT_S": f"{DRAIN_TIMEOUT_S:g}",
        **base_env(environ),
        **addresses.env(),
        "ROUNDHOUSE_HOME": str(layout.home),
        "ROUNDHOUSE_MODEL_STORE": str(layout.home / "store"),
        "ROUNDHOUSE_MODEL_IMPORT_DIR": str(layout.models),
        "ROUNDHOUSE_FILE_STORE": environ.get("ROUNDHOUSE_FILE_STORE") or str(layout.home / "files"),
    }
    server_names = tuple(spec.name for spec in servers)
    database = tuple(name for name in server_names if name == "postgres")

    def service(
        name: str,
        module: str,
        ops_port: int,
        *,
        env: Mapping[str, str] | None = None,
        stop_after: tuple[str, ...] = (),
        stop_deadline_s: float = DRAIN_TIMEOUT_S + 5.0,
    ) -> ProcessSpec:
        return ProcessSpec(
            name=name,
            command=(sys.executable, "-m", module),
            env={**common, "OPS_PORT": str(ops_port), **(env or {})},
            depends_on=("migrations", *server_names),
            stop_after=stop_after,
            ready=HttpProbe(f"http://127.0.0.1:{ops_port}/readyz"),
            stop_deadline_s=stop_deadline_s,
        )

    gateway_env = {"HTTP_PORT": str(ports.gateway_http), "ROUNDHOUSE_ADMIN_KEY": credentials.admin_key}
    gateway_env |= gateway_payments_env(environ, ports, credentials)
    gateway_env |= {name: value for name, value in environ.items() if name.upper() in PROXIES}
    return [
        *payment_specs(environ, base_env(environ), ports, credentials),
        ProcessSpec(
            name="migrations",
            command=(sys.executable, "-m", "infra.migrate", "up"),
            env=common,
            depends_on=database,
            one_shot=True,
        ),
        service("gateway", "services.gateway", ports.gateway_ops, env=gateway_env),
        service("scheduler", "services.scheduler", ports.scheduler_ops, stop_after=("gateway",)),
        service("batch", "services.batch", ports.batch_ops, stop_after=("gateway",)),
        service(
            "agent",
            "services.worker.agent",
            ports.agent_ops,
            env={"ROUNDHOUSE_NODE_ID": NODE_ID},
            stop_after=("gateway", "scheduler", "batch"),
            stop_deadline_s=DRAIN_TIMEOUT_S + 20.0,  # its workers drain first
        ),
        service(
            "billing",
            "services.billing",
            ports.billing_ops,
            stop_after=("gateway", "scheduler", "batch", "agent"),
        ),
    ]
