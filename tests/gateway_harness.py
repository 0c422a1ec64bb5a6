"""A gateway's management side on real PostgreSQL, RabbitMQ and Redis, with stand-ins for scheduler and billing.

The stand-ins carry out commands in the plainest way: what these tests look at is the gateway's half.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from services.gateway import edge, keys, management, public
from services.gateway.hub import Hub
from services.gateway.model_import import ModelImporter
from services.gateway.model_registry import ModelRegistry
from services.gateway.model_uploads import ModelUploads, UploadLimits
from services.gateway.openapi import PROBLEM
from services.gateway.outbox import Outbox
from services.gateway.owner import Owner
from services.gateway.payments.provider import PaymentProvider
from services.gateway.payments.webhook import PaymentWebhook
from services.gateway.queue_views import QueueDoor, QueueViews
from services.gateway.route_table import RouteTable
from services.gateway.routes import RouteSpec
from services.gateway.store import Store
from services.gateway.upload_table import UploadTable
from services.gateway.views import Views
from services.gateway.wire import WireSite
from services.scheduler.command_rules import problem_of
from services.scheduler.quotas import set_quota
from services.scheduler.scaling_store import SettingsChanged, set_scaling
from shared import messages, topology
from shared.broker import Broker, Delivery
from shared.commands import CommandCaller
from shared.database import Database
from shared.ids import new_id
from shared.messages import CommandResult
from shared.outcomes import Done

ADMIN_KEY = "sk-rh-" + "p" * 43


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        document = self.json
        return str(document["error"]["code"] if "error" in document else document["code"])


@dataclass
class Gateway:
    """Client and insides of a running gateway."""

    base: str
    session: aiohttp.ClientSession
    sql: asyncpg.Connection[asyncpg.Record]
    database: Database
    broker: Broker
    store: Store
    models: ModelRegistry
    key_cache: keys.KeyCache
    routes: RouteTable
    outbox: Outbox
    specs: list[RouteSpec]
    import_dir: Path
    model_store: Path
    uploads: ModelUploads
    commands: list[messages.Command] = field(default_factory=list)
    """What the stand-ins were asked, in order."""
    turned_off: list[str] = field(default_factory=list)
    """Resources whose waiting jobs were ended."""

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str | None = ADMIN_KEY,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        sent = dict(headers or {})
        if key:
            sent["Authorization"] = f"Bearer {key}"
        data = None
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        async with self.session.request(
            method, self.base + path, data=data, headers=sent, allow_redirects=False
        ) as reply:
            answer = Reply(reply.status, {k.lower(): v for k, v in reply.headers.items()}, await reply.read())
        check_described(self.specs, method, path.partition("?")[0], answer)
        return answer

    async def make_team(self, slug: str) -> str:
        """Return the secret of a new team's key with the scopes inference and manage."""
        reply = await self.call("POST", "/api/teams", {"slug": slug, "name": slug.title()})
        assert reply.status == 201, reply.body
        reply = await self.call(
            "POST", f"/api/keys?team={slug}", {"name": "first", "scopes": ["inference", "manage"]}
        )
        assert reply.status == 201, reply.body
        return str(reply.json["secret"])

    async def make_option(self, model_type: str, name: str = "bf16") -> dict[str, Any]:
        body = {
            "model_type": model_type, "name": name, "device_kind": "cpu", "precision": "bf16", "max_batch": 4,
            "max_context_tokens": 64, "kv_tokens": 256, "hourly_rate_usd": "0.60",
        }  # fmt: skip
        reply = await self.call("POST", "/api/options", body)
        assert reply.status == 201, reply.body
        option: dict[str, Any] = reply.json
        return option


def check_described(specs: list[RouteSpec], method: str, path: str, answer: Reply) -> None:
    """Every answer of a route is one that the OpenAPI page describes."""
    # A path without parameters comes first, as in the router
    for spec in sorted(specs, key=lambda spec: spec.template.count("{")):
        pattern = re.sub(r"\\{\w+\\}", "[^/]+", re.escape(spec.template))
        if spec.method == method and re.fullmatch(pattern, path):
            break
    else:
        return
    if answer.status < 400:
        assert spec.responses is not None and answer.status in spec.responses, (spec.path, answer.status)
        schema = spec.responses[answer.status]
        if schema is not None:
            Draft202012Validator(schema).validate(answer.json)
    elif answer.headers["content-type"].startswith("application/problem+json"):
        Draft202012Validator(PROBLEM).validate(answer.json)


class StandIn:
    """Runs commands as scheduler and billing would, with the tables' owner's rights."""

    def __init__(
        self, broker: Broker, pool: asyncpg.Pool[asyncpg.Record], seen: list[messages.Command]
    ) -> None:
        self._broker = broker
        self._pool = pool
        self._seen = seen

    async def on_command(self, delivery: Delivery) -> Done:
        command = delivery.message
        self._seen.append(command)
        async with self._pool.acquire() as sql, sql.transaction():
            try:
                result = await self._run(sql, command)
            except asyncpg.UniqueViolationError:
                result = self._no(command, "name_taken")
        await self._broker.send(command.reply_queue, result)
        return Done()

    def _no(self, command: messages.Command, code: str) -> CommandResult:
        return CommandResult(command_id=command.command_id, ok=False, code=code, message=code)

    async def _run(self, sql: Any, command: Any) -> CommandResult:
        body: dict[str, Any] = {}
        match command:
            case messages.CreateOption():
                body = {"option_id": new_id("opt")}
                await sql.execute(
                    "INSERT INTO scheduler.performance_options VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
                    body["option_id"], command.model_type, command.name, command.device_kind, command.precision,
                    command.max_batch, command.max_context_tokens, command.kv_tokens, command.hourly_rate_nanousd,
                )  # fmt: skip
            case messages.CreateResource():
                body = {"resource_id": new_id("res")}
                await sql.execute(
                    "INSERT INTO scheduler.resources (resource_id, team_id, name, model_type, option_id, pool, fixed_count)"
                    " VALUES ($1, $2, $3, $4, $5, $6, $7)",
                    body["resource_id"], command.team_id, command.name, command.model_type, command.option_id,
                    command.pool, command.fixed_count,
                )  # fmt: skip
            case messages.SetPrice():
                body = {"price_id": new_id("price")}
                await sql.execute(
                    "INSERT INTO billing.prices VALUES ($1, $2, $3, $4, $5, to_timestamp($6::float8 / 1000))",
                    body["price_id"], command.model_type, command.work_class, command.prompt_nanousd,
                    command.completion_nanousd, float(command.starts_unix_ms),
                )  # fmt: skip
            case messages.SetQuota():
                problem = problem_of(command)
                if problem is not None:
                    return CommandResult(
                        command_id=command.command_id, ok=False, code="invalid_value", message=problem
                    )
                await set_quota(sql, command)
            case _:
                return await self._change(sql, command)
        return CommandResult(command_id=command.command_id, ok=True, body=body)

    async def _change(self, sql: Any, command: Any) -> CommandResult:
        row = await sql.fetchrow(
            "SELECT * FROM scheduler.resources WHERE resource_id = $1 AND team_id = $2 AND deleted_at IS NULL",
            command.resource_id,
            command.team_id,
        )
        if row is None:
            return self._no(command, "not_found")
        if isinstance(command, messages.PinModel | messages.UnpinModel | messages.PreloadModel):
            return await self._pin(sql, command, row["fixed_count"])
        if isinstance(command, messages.DeleteResource) and row["state"] != "off":
            return self._no(command, "resource_not_off")
        if isinstance(command, messages.TurnOffResource):
            # Not in one step: the table knows no way from live to off.
            await sql.execute(
                "UPDATE scheduler.resources SET state = 'draining' WHERE resource_id = $1 AND state <> 'off'",
                command.resource_id,
            )
        if isinstance(command, messages.SetScaling):
            problem = problem_of(command)
            if problem is not None:
                return CommandResult(
                    command_id=command.command_id, ok=False, code="invalid_value", message=problem
                )
            try:
                await set_scaling(sql, command)
            except SettingsChanged:
                return self._no(command, "precondition_failed")
            return CommandResult(command_id=command.command_id, ok=True)
        changes: dict[type[Any], str] = {
            messages.TurnOnResource: "wanted = 'on', state = 'starting'",
            messages.TurnOffResource: "wanted = 'off', state = 'off'",
            messages.DeleteResource: "deleted_at = now()",
        }
        change = changes.get(type(command))
        if isinstance(command, messages.ScaleResource):
            change = f"fixed_count = {command.fixed_count:d}"
        await sql.execute(
            f"UPDATE scheduler.resources SET {change} WHERE resource_id = $1", command.resource_id
        )
        return CommandResult(command_id=command.command_id, ok=True)

    async def _pin(self, sql: Any, command: Any, gpus: int) -> CommandResult:
        where = (command.resource_id, command.model_id)
        if isinstance(command, messages.PinModel):
            if (command.copies or 0) > gpus:
                return self._no(command, "too_many_copies")
            await sql.execute(
                "DELETE FROM scheduler.model_pins WHERE resource_id = $1 AND model_id = $2", *where
            )
            await sql.execute("INSERT INTO scheduler.model_pins VALUES ($1, $2, $3)", *where, command.copies)
        elif isinstance(command, messages.UnpinModel):
            await sql.execute(
                "DELETE FROM scheduler.model_pins WHERE resource_id = $1 AND model_id = $2", *where
            )
        return CommandResult(command_id=command.command_id, ok=True)


@asynccontextmanager
async def running_gateway(
    database_url: str,
    amqp_url: str,
    folder: Path,
    *,
    stand_ins: Sequence[topology.Queue] = (topology.SCHEDULER_COMMANDS, topology.BILLING_COMMANDS),
    payments: PaymentProvider | None = None,
    webhook_secrets: Sequence[str] = (),
    hub_url: str | None = None,
) -> AsyncIterator[Gateway]:
    """stand_ins: the queues of the services that are stood in for; behind others a test runs the real one."""
    import_dir, model_store = folder / "import", folder / "store"
    import_dir.mkdir(exist_ok=True)
    model_store.mkdir(exist_ok=True)
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        sql = await asyncpg.connect(database_url)
        stack.push_async_callback(sql.close)
        pool = await asyncpg.create_pool(database_url, min_size=1, max_size=2)
        stack.push_async_callback(pool.close)
        database = await Database.open(database_url, "roundhouse_gateway", stack)
        broker = await Broker.open(amqp_url, "gateway-test", stack)
        group = await stack.enter_async_context(asyncio.TaskGroup())

        store, registry, views = Store(database), ModelRegistry(database), Views(database)
        key_cache, routes = keys.KeyCache(store), RouteTable(registry, views)
        outbox, commands = Outbox(database, broker), CommandCaller(broker)
        owner = Owner(broker, outbox.add, commands.on_result)
        commands.reply_queue = owner.queue
        await store.ensure_platform(
            new_id("team"), keys.new_key("", "environment", ADMIN_KEY, ("platform", "manage", "inference"))
        )
        await owner.start(group)
        seen: list[messages.Command] = []
        turned_off: list[str] = []

        async def when_off(resource_id: str, code: str, message: str) -> int:
            turned_off.append(f"{resource_id} {code}")
            return await owner.fail_queued(resource_id, code, message)

        stand_in = StandIn(broker, pool, seen)
        background = [
            group.create_task(routes.keep_fresh(when_off)),
            group.create_task(key_cache.keep_fresh()),
        ]
        for queue, of in (
            (topology.SCHEDULER_COMMANDS, messages.SchedulerCommand),
            (topology.BILLING_COMMANDS, messages.BillingCommand),
        ):
            if queue in stand_ins:
                background.append(group.create_task(broker.consume(queue, of, stand_in.on_command)))
        importer = ModelImporter(import_dir, model_store, asyncio.Lock())
        uploads = ModelUploads(UploadTable(database), model_store, UploadLimits())
        hub = Hub(uploads, hub_url is not None, hub_url, asyncio.Semaphore(2))
        deps = management.ManagementDeps(
            store,
            registry,
            views,
            routes,
            key_cache,
            commands,
            importer,
            uploads,
            hub,
            None,
            QueueDoor(QueueViews(database), "amqp://queue.example.com/teams", "teams"),
            payments,
        )
        webhook = PaymentWebhook(store, broker, webhook_secrets).routes() if webhook_secrets else []
        specs = public.with_openapi([*management.routes(deps), *public.routes(list), *webhook])
        runner = edge.build_runner(edge.build_app(specs, key_cache, edge.EdgeLimits()), drain_timeout_s=0.1)
        await runner.setup()
        edge.guard_expectations(runner)
        site = WireSite(runner, "127.0.0.1", 0, max_per_peer=1000)
        await site.start()
        try:
            yield Gateway(
                f"http://127.0.0.1:{site.port}", session, sql, database, broker, store, registry, key_cache, routes, outbox, specs,
                import_dir, model_store, uploads, seen, turned_off,
            )  # fmt: skip
        finally:
            await runner.cleanup()
            for task in [*background, *group._tasks]:
                task.cancel()
