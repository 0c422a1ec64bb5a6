"""A gateway with stub workers on a database and a vhost of their own: what the measuring scripts drive.

The scheduler is left out: the resource's row says "live", and workers are started here, so that a measurement has
exactly the processes that it names.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import msgspec

from infra.local.demo_model import BASE_NAME, ensure_demo_models
from infra.local.layout import ROOT, main_layout
from infra.local.scratch import execute, scratch_database, scratch_vhost
from infra.local.testservers import running_servers
from loadtest.process_tree import parent_of, process_tree
from shared.ids import new_id
from shared.messages import WorkerSpec

MODEL_TYPE = "smollm2-135m"
READY_LIMIT_S = 60.0
REAL_KV_TOKENS = 16 * 1024


@dataclass
class Stack:
    """base_url and api_key are what a client needs; model is the name that it asks for."""

    base_url: str
    api_key: str
    model: str
    resource_id: str
    database_url: str
    amqp_url: str
    management_url: str
    _environment: dict[str, str]
    _folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start_worker(self, name: str, *, step_s: float, max_batch: int, tokens_per_step: int = 1) -> None:
        """Start a stub worker and wait until it takes jobs."""
        pace = {"STUB_STEP_S": str(step_s), "STUB_TOKENS_PER_STEP": str(tokens_per_step)}
        self._start_worker(name, "loadtest.stub_worker", max_batch, 1 << 20, pace)

    def start_real_worker(self, name: str) -> None:
        """Start a worker with the real engine; it loads the model at its first job."""
        self._start_worker(name, "services.worker", 16, REAL_KV_TOKENS, {})

    def _start_worker(
        self, name: str, module: str, max_batch: int, kv_tokens: int, environment: dict[str, str]
    ) -> None:
        spec = WorkerSpec(
            worker_id=new_id("wrk"),
            resource_id=self.resource_id,
            place=0,
            incarnation=new_id("inc"),
            pool=False,
            model_type=MODEL_TYPE,
            precision="bf16",
            device_kind="cpu",
            max_batch=max_batch,
            max_context_tokens=2048,
            kv_tokens=kv_tokens,
        )
        port = free_port()
        environment = {
            "OPS_PORT": str(port),
            "ROUNDHOUSE_WORKER_SPEC": msgspec.json.encode(spec).decode(),
            **environment,
        }
        self._start(name, module, environment)
        wait_ready(f"http://127.0.0.1:{port}/readyz", self.processes[name])

    def restart_gateway(self) -> None:
        """Start the gateway again, at the address that it had."""
        port = urllib.parse.urlsplit(self.base_url).port
        ops_port = free_port()
        self._start("gateway", "services.gateway", {"HTTP_PORT": str(port), "OPS_PORT": str(ops_port)})
        wait_ready(f"http://127.0.0.1:{ops_port}/readyz", self.processes["gateway"])

    def start_service(self, name: str) -> None:
        """Start `services.<name>` and wait until it is ready."""
        port = free_port()
        self._start(name, f"services.{name}", {"OPS_PORT": str(port)})
        wait_ready(f"http://127.0.0.1:{port}/readyz", self.processes[name])

    def start_fleet(self, devices: int, worker_module: str, environment: dict[str, str]) -> None:
        """Start scheduler and node agent: from now on workers come and go as resources are turned on and off.

        The stack's own resource is turned off first: nobody but the scheduler may say that it is live.
        """
        for state in ("draining", "off"):
            execute(
                self.database_url,
                f"UPDATE scheduler.resources SET wanted = 'off', state = '{state}'"
                f" WHERE resource_id = '{self.resource_id}'",
            )
        self.start_service("scheduler")
        port = free_port()
        self._start(
            "agent",
            "services.worker.agent",
            {
                "OPS_PORT": str(port),
                "ROUNDHOUSE_NODE_ID": "stack",
                "ROUNDHOUSE_HOME": str(self._folder / "home"),
                "ROUNDHOUSE_DEVICES": ",".join(f"cpu:{index}" for index in range(devices)),
                "ROUNDHOUSE_WORKER_COMMAND": json.dumps([sys.executable, "-m", worker_module]),
                **environment,
            },
        )
        wait_ready(f"http://127.0.0.1:{port}/readyz", self.processes["agent"])

    def _start(self, name: str, module: str, environment: dict[str, str]) -> None:
        log = (self._folder / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", module], cwd=ROOT, env={**self._environment, **environment}, stderr=log
        )

    def stop(self, name: str) -> None:
        process = self.processes.pop(name)
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def memory_bytes(self) -> dict[str, int]:
        """Resident memory of each process of ours, and what the broker's node says of itself."""
        sizes = {name: process_tree(process.pid).resident_bytes for name, process in self.processes.items()}
        sizes["rabbitmq"] = int(get_json(f"{self.management_url.rstrip('/')}/api/nodes")[0]["mem_used"])
        return sizes

    def processor_s(self) -> dict[str, float]:
        """Processor time that each process of ours has had, with its children's, and that of the servers on this machine.

        A process that was killed takes its time with it.
        """
        roots = {name: process.pid for name, process in self.processes.items()}
        node = get_json(f"{self.management_url.rstrip('/')}/api/nodes")[0]
        roots["rabbitmq"] = int(node["os_pid"])
        roots["postgres"] = asyncio.run(_postmaster_pid(self.database_url))
        return {name: process_tree(pid).processor_s for name, pid in roots.items()}


async def _postmaster_pid(database_url: str) -> int:
    connection = await asyncpg.connect(database_url)
    try:
        return parent_of(int(await connection.fetchval("SELECT pg_backend_pid()")))
    finally:
        await connection.close()


@contextmanager
def running_stack() -> Iterator[Stack]:
    """Yield a stack with a ready gateway and no worker yet; everything is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="roundhouse-loadtest-"))
    with running_servers(os.environ) as servers:
        if servers.amqp_management_url is None:
            raise SystemExit("loadtest: AMQP_URL is set without AMQP_MANAGEMENT_URL")
        with (
            scratch_database(servers.database_url, prefix="loadtest") as database_url,
            scratch_vhost(servers.amqp_url, servers.amqp_management_url, "loadtest") as amqp_url,
            scratch_vhost(servers.amqp_url, servers.amqp_management_url, "teams") as teams_url,
        ):
            environment = {
                **os.environ,
                "DATABASE_URL": database_url,
                "AMQP_URL": amqp_url,
                "AMQP_MANAGEMENT_URL": servers.amqp_management_url,
                "TEAMS_VHOST": urllib.parse.urlsplit(teams_url).path.removeprefix("/"),
                "REDIS_URL": servers.redis_url,
                "ROUNDHOUSE_MODEL_STORE": str(folder / "store"),
                "ROUNDHOUSE_MODEL_IMPORT_DIR": str(main_layout().models),
                "ROUNDHOUSE_FILE_STORE": str(folder / "files"),
                "ROUNDHOUSE_ADMIN_KEY": "sk-rh-" + secrets.token_urlsafe(32),
                "TEAM_REQUESTS_PER_S": "100000",
                "TEAM_BURST": "100000",
                "TEAM_IN_FLIGHT": "100000",
                "GATEWAY_IN_FLIGHT": "100000",
                "LOG_LEVEL": "WARNING",
            }
            subprocess.run(
                [sys.executable, "-m", "infra.migrate", "up"], cwd=ROOT, env=environment, check=True
            )
            stack = Stack(
                "",
                "",
                f"load/{BASE_NAME}",
                new_id("res"),
                database_url,
                amqp_url,
                servers.amqp_management_url,
                environment,
                folder,
            )
            try:
                _start_gateway(stack, environment)
                yield stack
            except BaseException:
                for log in sorted(folder.glob("*.log")):
                    print(f"--- {log.name}\n{log.read_text()[-2000:]}", file=sys.stderr)
                raise
            finally:
                for name in list(stack.processes):
                    stack.stop(name)
                shutil.rmtree(folder)


def _start_gateway(stack: Stack, environment: dict[str, str]) -> None:
    ensure_demo_models(main_layout().models, lambda line: None)
    http_port, ops_port = free_port(), free_port()
    base_url = stack.base_url = f"http://127.0.0.1:{http_port}"
    stack._start("gateway", "services.gateway", {"HTTP_PORT": str(http_port), "OPS_PORT": str(ops_port)})
    wait_ready(f"http://127.0.0.1:{ops_port}/readyz", stack.processes["gateway"])
    admin = environment["ROUNDHOUSE_ADMIN_KEY"]
    team = post(f"{base_url}/api/teams", admin, {"slug": "load", "name": "load test"})
    key = post(f"{base_url}/api/keys?team=load", admin, {"name": "load", "scopes": ["inference", "manage"]})
    post(
        f"{base_url}/api/models?team=load",
        admin,
        {"name": BASE_NAME, "path": BASE_NAME, "model_type": MODEL_TYPE},
    )
    stack.api_key = key["secret"]
    execute(
        stack.database_url,
        f"""
        INSERT INTO scheduler.performance_options (option_id, model_type, name, device_kind, precision, max_batch,
            max_context_tokens, kv_tokens, hourly_rate_nanousd)
        VALUES ('opt_stub', '{MODEL_TYPE}', 'stub', 'cpu', 'bf16', 64, 2048, 1048576, 0);
        INSERT INTO scheduler.resources (resource_id, team_id, name, model_type, option_id, wanted, fixed_count, state)
        VALUES ('{stack.resource_id}', '{team["team_id"]}', 'stub', '{MODEL_TYPE}', 'opt_stub', 'on', 1, 'live');
        """,
    )
    time.sleep(1.5)  # the gateway's route table looks every half second


def post(url: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST JSON with a key; any answer but a 2xx raises."""
    request = urllib.request.Request(url, method="POST", data=json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=90) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"POST {url}: {error.code} {error.read()[:500]!r}") from error


def get_json(url: str) -> Any:
    """GET JSON; a user and password in the URL become basic authentication."""
    parts = urllib.parse.urlsplit(url)
    plain = parts._replace(netloc=f"{parts.hostname}:{parts.port}").geturl()
    manager = urllib.request.HTTPPasswordMgrWithPriorAuth()
    user, password = urllib.parse.unquote(parts.username or ""), urllib.parse.unquote(parts.password or "")
    manager.add_password(None, plain, user, password, is_authenticated=bool(user))
    opener = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(manager))
    with opener.open(plain, timeout=20) as answer:
        return json.load(answer)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Return once `url` answers 200. Raises when the process ends or takes too long."""
    deadline_s = time.monotonic() + READY_LIMIT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{process.args!r} was not ready within {READY_LIMIT_S} s")
