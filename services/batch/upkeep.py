"""The small long tasks of the leader: renew the lease, send facts to billing, forget old answers to commands."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from services.batch.results import Results
from services.batch.store import Store
from shared.broker import Broker
from shared.file_store import FileStore
from shared.lease import Fenced, Lease
from shared.outcomes import PublishRefused, Unavailable, Unroutable

log = structlog.get_logger()

LEASE_LOOK_S = 0.5
RELAY_S = 0.5
RELAY_GROUP = 100
KEEP_SENT_S = 3600.0
KEEP_RESULTS_S = 24 * 3600.0
SWEEP_S = 600.0
SWEEP_GROUP = 100
SWEEP_LINES = 5000
KEEP_LINES_S = 24 * 3600.0
"""Rows of lines hold each answer once more; after a day the files alone have them."""
HAND_OVER_S = 5.0


async def lead(lease: Lease) -> None:
    """Return when this process leads."""
    while True:
        try:
            if await lease.ensure():
                return
        except Unavailable as error:
            log.warning("lease_not_taken", error=str(error))
        await asyncio.sleep(LEASE_LOOK_S)


async def keep_leading(lease: Lease) -> None:
    """Renew until cancelled. Raises `Fenced` when another one leads: this process then ends, and stands by anew."""
    while True:
        try:
            if not await lease.ensure():
                raise Fenced("another batch service leads")
        except Unavailable as error:
            log.warning("lease_not_renewed", error=str(error))
        await asyncio.sleep(LEASE_LOOK_S)


async def until_done(begin: Callable[[], Awaitable[None]]) -> None:
    """Call what has to be done before the first round until it worked."""
    while True:
        try:
            return await begin()
        except Unavailable as error:
            log.warning("start_held", error=str(error))
            await asyncio.sleep(LEASE_LOOK_S)


async def hand_over(lease: Lease, results: Results) -> None:
    """Write what is known and give the lease away, if the database is there; the next one manages without."""
    try:
        async with asyncio.timeout(HAND_OVER_S):
            await results.flush()
            await lease.release()
    except (Unavailable, Fenced, TimeoutError) as error:
        log.warning("lease_not_released", error=f"{type(error).__name__}: {error}")


async def relay(store: Store, broker: Broker) -> None:
    """Publish facts until cancelled. Twice is harmless: billing knows each fact by its id."""
    while True:
        try:
            facts = await store.unsent_voids(RELAY_GROUP)
            for fact in facts:
                await broker.publish_event(fact)
            if facts:
                await store.mark_sent([fact.event_id for fact in facts], KEEP_SENT_S)
            if len(facts) == RELAY_GROUP:
                continue
        except (PublishRefused, Unroutable, Unavailable) as error:
            log.warning("facts_held", error=f"{type(error).__name__}: {error}")
        await asyncio.sleep(RELAY_S)


async def sweep(store: Store, files: FileStore) -> None:
    """Forget old answers to commands, files whose time is over, and lines of batches that are long over."""
    while True:
        try:
            await store.sweep_results(KEEP_RESULTS_S)
            for file_id, path in await store.expired_files(SWEEP_GROUP):
                await files.delete(path)
                await store.mark_file_deleted(file_id)
            while await store.sweep_lines(KEEP_LINES_S, SWEEP_LINES):
                pass
        except Unavailable as error:
            log.warning("not_swept", error=str(error))
        await asyncio.sleep(SWEEP_S)
