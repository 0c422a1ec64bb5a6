"""Builds the gateway by hand and runs it: `python -m services.gateway`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog
from opentelemetry.metrics import CallbackOptions, Observation

from services.gateway import admission, edge, keys, management, public
from services.gateway.batches import batch_routes, event_routes, file_routes, quote_routes, schedule_routes
from services.gateway.batches.tables import Tables
from services.gateway.hub import FETCHES_AT_ONCE, Hub
from services.gateway.inference import http as inference
from services.gateway.inference.measures import InferenceMetrics
from services.gateway.management.idempotency import KEEP_S
from services.gateway.model_import import ModelImporter
from services.gateway.model_registry import ModelRegistry
from services.gateway.model_uploads import ModelUploads, UploadLimits
from services.gateway.outbox import Outbox
from services.gateway.owner import Owner
from services.gateway.payments.provider import StripeApi
from services.gateway.payments.webhook import PaymentWebhook
from services.gateway.queue_views import QueueDoor, QueueViews
from services.gateway.rate_limit import RateLimiter, RateRule
from services.gateway.route_table import RouteTable
from services.gateway.settings import GatewaySettings
from services.gateway.store import Store
from services.gateway.upload_table import UploadTable
from services.gateway.views import Views
from services.gateway.wire import WireSite
from shared import telemetry
from shared.broker import Broker
from shared.budgets.gate import BudgetGate
from shared.budgets.table import BudgetTable
from shared.commands import CommandCaller
from shared.database import Database
from shared.file_store import FileStore
from shared.ids import new_id
from shared.inference.principal import ModelView
from shared.inference.tokenizers_pool import TokenizerPool
from shared.outcomes import Unavailable
from shared.runtime import Lifetime, run
from shared.settings import SettingsError

log = structlog.get_logger()
ROLE = "roundhouse_gateway"
SWEEP_S = 3600.0
UNUSED_MODEL_KEEP_S = 24 * 3600.0
"""How long the files of deleted models and removed revisions stay: far longer than any job that names them."""
OUTBOX_FLUSH_S = 5.0


async def serve(settings: GatewaySettings, life: Lifetime) -> None:
    database = await Database.open(settings.database_url, ROLE, life.stack, size=10)
    broker = await Broker.open(settings.amqp_url, "gateway", life.stack)
    rule = RateRule(settings.team_requests_per_s, settings.team_burst)
    limiter = RateLimiter(settings.redis_url, rule, life.stack)
    gate = admission.Gate(limiter, admission.Limits(settings.team_in_flight, settings.gateway_in_flight))

    store, registry, views = Store(database), ModelRegistry(database), Views(database)
    tokenizers = TokenizerPool(settings.model_store)
    key_cache = keys.KeyCache(store)
    route_table = RouteTable(registry, views, lambda models: tokenizers.prewarm(tokenizer_folders(models)))
    outbox, commands = Outbox(database, broker), CommandCaller(broker)
    owner = Owner(broker, outbox.add, commands.on_result)
    commands.reply_queue = owner.queue
    limits = inference.InferenceLimits()
    caps = BudgetTable(database)
    budgets = BudgetGate(broker, caps, owner.instance_id, limits.deadline_s)
    importer = ModelImporter(settings.model_import_dir, settings.model_store, asyncio.Lock())
    uploads = ModelUploads(UploadTable(database), settings.model_store, upload_limits(settings))
    hub = Hub(
        uploads,
        settings.hub_enabled or settings.hub_url is not None,
        settings.hub_url,
        asyncio.Semaphore(FETCHES_AT_ONCE),
    )

    await ensure_platform(store, settings.admin_key)
    await owner.start(life.group)
    await budgets.start(life.group)
    life.group.create_task(caps.keep_fresh())
    life.group.create_task(route_table.keep_fresh(owner.fail_queued))
    life.group.create_task(key_cache.keep_fresh())
    life.group.create_task(outbox.relay())
    life.group.create_task(sweep_idempotency(store))
    life.group.create_task(sweep_models(registry, importer))
    life.group.create_task(sweep_uploads(uploads))
    life.group.create_task(limiter.keep_leases())
    tokenizers.start(life.group)

    api = management.ManagementDeps(
        store, registry, views, route_table, key_cache, commands, importer, uploads, hub, settings.public_url,
        QueueDoor(QueueViews(database), settings.teams_amqp_url, settings.teams_vhost), await payment_provider(settings, life),
    )  # fmt: skip
    generation = inference.InferenceDeps(
        route_table, tokenizers, gate, budgets, owner, InferenceMetrics(telemetry.meter()), limits
    )
    batches = file_routes.FileDeps(Tables(database), FileStore(settings.file_store), commands)
    life.group.create_task(file_routes.sweep_files(batches.tables, batches.files))
    specs = [
        *inference.routes(generation),
        *file_routes.routes(batches),
        *batch_routes.routes(batches, store),
        *quote_routes.routes(batches, store),
        *event_routes.routes(batches),
        *schedule_routes.routes(batches, store),
        *management.routes(api),
        *public.routes(life.not_ready),
    ]
    if settings.webhook_secrets:
        specs += PaymentWebhook(store, broker, settings.webhook_secrets).routes()
    edge_limits = edge.EdgeLimits(settings.max_body_bytes, allowed_hosts=settings.hosts)
    app = edge.build_app(public.with_openapi(specs), key_cache, edge_limits)
    runner = edge.build_runner(app, drain_timeout_s=settings.drain_timeout_s)
    await runner.setup()
    edge.guard_expectations(runner)
    site = WireSite(
        runner, settings.http_host, settings.http_port, max_per_peer=settings.max_connections_per_ip
    )
    await site.start()

    _gauge("roundhouse.gateway.in_flight", "Inference requests running here", lambda: gate.in_flight)
    _gauge("roundhouse.gateway.jobs", "Live jobs owned here", lambda: len(owner))
    _gauge(
        "roundhouse.outbox.in_memory", "Facts that the database did not take yet", lambda: outbox.in_memory
    )
    life.check("broker", lambda: broker.connected)
    life.check("routes", lambda: route_table.loaded)
    life.check("budgets", lambda: caps.loaded)
    life.started()
    log.info("gateway_listening", host=settings.http_host, port=site.port, instance=owner.instance_id)
    await life.stopping.wait()
    # Listening ends at once; running requests have `drain_timeout_s`, then they are cancelled and their jobs voided.
    await runner.cleanup()
    await budgets.drain()
    await flush(outbox)


def tokenizer_folders(models: Sequence[ModelView]) -> list[str]:
    """Return each folder once, where it comes last: adapters share their base's."""
    return list(reversed(dict.fromkeys(model.tokenizer_folder for model in reversed(models))))


async def payment_provider(settings: GatewaySettings, life: Lifetime) -> StripeApi | None:
    """The provider that is set up, if any."""
    if not settings.payments_api_key:  # a variable that is set to nothing names no provider
        return None
    return await StripeApi.open(settings.payments_api_url, settings.payments_api_key, life.stack)


def _gauge(name: str, description: str, read: Callable[[], int]) -> None:
    def observe(_options: CallbackOptions) -> list[Observation]:
        return [Observation(read())]

    telemetry.meter().create_observable_gauge(name, [observe], description=description)


async def ensure_platform(store: Store, secret: str) -> None:
    """Make the platform's team and key. Raises `SettingsError` for a key that no request could carry."""
    if not keys.is_secret(secret):
        raise SettingsError("ROUNDHOUSE_ADMIN_KEY must be sk- and 16 to 200 letters, digits, _ or -")
    scopes = ("platform", "manage", "inference")
    await store.ensure_platform(new_id("team"), keys.new_key("", "environment", secret, scopes))


async def sweep_idempotency(store: Store) -> None:
    while True:
        try:
            await store.sweep_idempotent(KEEP_S)
        except Unavailable as error:
            log.warning("idempotency_keys_not_swept", error=str(error))
        await asyncio.sleep(SWEEP_S)


async def sweep_models(registry: ModelRegistry, importer: ModelImporter) -> None:
    while True:
        try:
            swept = await importer.sweep(await registry.folders_unused_for(UNUSED_MODEL_KEEP_S))
        except Unavailable as error:
            log.warning("unused_models_not_swept", error=str(error))
        else:
            if swept:
                log.info("unused_models_swept", count=len(swept))
        await asyncio.sleep(SWEEP_S)


def upload_limits(settings: GatewaySettings) -> UploadLimits:
    return UploadLimits(
        team_bytes=settings.team_upload_bytes,
        team_uploads=settings.team_open_uploads,
        files_at_once=settings.uploads_at_once,
        expires_after_s=settings.upload_expiry_s,
    )


async def sweep_uploads(uploads: ModelUploads) -> None:
    while True:
        try:
            swept = await uploads.sweep()
        except Unavailable as error:
            log.warning("uploads_not_swept", error=str(error))
        else:
            if swept:
                log.info("uploads_swept", count=len(swept))
        await asyncio.sleep(SWEEP_S)


async def flush(outbox: Outbox) -> None:
    """Give facts that only this process knows a last chance; rows are found by any gateway."""
    try:
        async with asyncio.timeout(OUTBOX_FLUSH_S):
            await outbox.flushed()
    except TimeoutError:
        log.error("outbox_facts_lost", count=outbox.in_memory)


if __name__ == "__main__":
    run("gateway", GatewaySettings, serve)
