"""Keeps a bounded number of lines with each resource, dealt out fairly between teams, and sees each batch to its end.

Level-triggered: every round compares the open batches with what is out, and acts. What a dead process had sent is put
back by `takeover` before the first round.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

import structlog

from services.batch.endings import Endings
from services.batch.fairness import Turns, deal
from services.batch.files import Finisher
from services.batch.line_run import LineRun, voids_of_lost
from services.batch.owner import LineOwner
from services.batch.pages import Pages
from services.batch.preparation import Prepared, Preparer
from services.batch.records import Batch, Dispatched
from services.batch.results import Results
from services.batch.routing import Payer, Purse, Waiting, choose_paid_route
from services.batch.states import LineEnd
from services.batch.store import Store
from services.batch.validation import Validator
from services.batch.views import Views
from shared.file_store import FileStore, MissingFile
from shared.inference.errors import ApiError
from shared.inference.principal import ResourceView, Route
from shared.outcomes import Unavailable

log = structlog.get_logger()

LOOK_S = 0.5
"""Between two looks at batches and resources."""
ROUND_S = 0.02
GROUP_LINES = 64
"""Of lines that go out in one statement: small, so that the first of them are not held up by the last."""
MAX_UNWRITTEN = 2000
NOTE_S = 2.0
FILES_AT_ONCE = 2
"""Of files that are checked or written."""
LOST_GROUP_LINES = 500


@dataclass(slots=True)
class _Open:
    """A batch that is not over, as its dispatcher sees it."""

    batch: Batch
    pages: Pages | None = None
    route: Route | None = None
    waiting_for: str = ""
    noted_s: float = 0.0
    noted: tuple[float, float, str] | None = None

    def halt(self) -> None:
        """Nothing of it goes out any more."""
        self.pages = self.route = None


class Dispatcher:
    def __init__(
        self,
        store: Store,
        views: Views,
        files: FileStore,
        owner: LineOwner,
        results: Results,
        endings: Endings,
        preparer: Preparer,
        in_flight: int,
    ) -> None:
        """in_flight: lines of one resource that are out at once."""
        self._store, self._views, self._files = store, views, files
        self._owner, self._results, self._endings = owner, results, endings
        self._preparer = preparer
        self._in_flight = in_flight
        self._validator = Validator(store, views, files)
        self._finisher = Finisher(store, files)
        self._files_at_once = asyncio.Semaphore(FILES_AT_ONCE)
        self._busy: set[str] = set()
        """Batches whose files are being checked or written."""
        self._open: dict[str, _Open] = {}
        """By id, oldest first."""
        self._turns: dict[str, Turns] = {}
        """By resource."""
        self._wake = asyncio.Event()

    @property
    def lines_out(self) -> int:
        return len(self._owner)

    async def takeover(self) -> None:
        """Put back what an earlier leader had sent: nobody waits for those jobs any more, and nobody pays for them."""
        for batch in await self._store.open_batches():
            lost = await self._store.running_lines(batch)
            for start in range(0, len(lost), LOST_GROUP_LINES):
                some = lost[start : start + LOST_GROUP_LINES]
                voids = [void for each in some for void in voids_of_lost(each)]
                await self._store.requeue([(batch.batch_id, n.line, n.job_id) for n in some], voids)
            if lost:
                log.info("lines_put_back", batch_id=batch.batch_id, count=len(lost))

    def wake(self) -> None:
        """Something changed that a round should see soon."""
        self._wake.set()

    def came_back(self, batch_id: str) -> None:
        """Lines of this batch wait again."""
        entry = self._open.get(batch_id)
        if entry is not None and entry.pages is not None:
            entry.pages.restart()
        self.wake()

    async def run(self) -> None:
        looked_s = 0.0
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    if time.monotonic() - looked_s > LOOK_S:
                        await self._look(group)
                        looked_s = time.monotonic()
                    self._read_ahead(group)
                    await self._send_lines(group)
                except Unavailable as error:
                    log.warning("batches_held", error=str(error))
                    await asyncio.sleep(LOOK_S)
                try:
                    async with asyncio.timeout(LOOK_S):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                self._wake.clear()
                await asyncio.sleep(ROUND_S)

    # ---- what there is

    async def _look(self, group: asyncio.TaskGroup) -> None:
        batches = await self._store.open_batches()
        resources, purse = await self._views.resources(), await self._views.purse()
        fallbacks = await self._views.ppt_fallback(sorted({batch.team_id for batch in batches}))
        known = {batch.batch_id for batch in batches}
        for batch_id in self._open.keys() - known:
            del self._open[batch_id]
            self._endings.forget(batch_id)
        for batch in batches:
            entry = self._open.setdefault(batch.batch_id, _Open(batch))
            entry.batch = batch
            if batch.state == "validating":
                self._beside(group, batch, self._validator.validate)
            elif batch.state == "in_progress" and batch.expires_at.timestamp() > time.time():
                await self._route(entry, resources, fallbacks.get(batch.team_id, False), purse)
                await self._progress(entry)
            elif batch.state == "in_progress":
                if await self._is_closed(entry, "expired"):
                    await self._store.begin_finalizing(batch.batch_id)
            elif batch.state == "finalizing" or await self._is_closed(entry, "cancelled"):
                self._beside(group, batch, self._finisher.finish)
        await self._take_back({resource.resource_id for resource in resources})

    def _beside(
        self, group: asyncio.TaskGroup, batch: Batch, work: Callable[[Batch], Awaitable[None]]
    ) -> None:
        """Do a long thing about a batch beside the rounds, once at a time; what fails is tried again."""
        if batch.batch_id in self._busy:
            return
        self._busy.add(batch.batch_id)

        async def run() -> None:
            try:
                async with self._files_at_once:
                    await work(batch)
            except Unavailable as error:
                log.warning("batch_held", batch_id=batch.batch_id, state=batch.state, error=str(error))
                await asyncio.sleep(LOOK_S)
            finally:
                self._busy.discard(batch.batch_id)
                self.wake()

        group.create_task(run())

    async def _is_closed(self, entry: _Open, state: LineEnd) -> bool:
        """End all lines of a batch that is over, and return whether it is written that they have."""
        batch_id = entry.batch.batch_id
        entry.halt()
        await self._endings.close(self._owner, self._owner.runs_of(batch_id), state)
        await self._store.close_waiting(batch_id, state)
        return not self._results.pending(batch_id) and await self._store.is_done(batch_id)

    async def _route(
        self, entry: _Open, resources: Iterable[ResourceView], ppt_fallback: bool, purse: Purse
    ) -> None:
        batch = entry.batch
        if entry.pages is None:
            model = await self._views.model(batch.model_id or "", batch.revision or 0)
            if model is None:
                entry.waiting_for = "the model was deleted"
                return
            entry.pages = Pages(batch, model, self._store, self._files, self._preparer)
        payer = Payer(batch.team_id, batch.key_id, batch.model_id or "")
        route = choose_paid_route(payer, ppt_fallback, batch.model_type or "", resources, purse)
        if isinstance(route, Waiting):
            entry.route, entry.waiting_for = None, route.reason
        else:
            entry.route, entry.waiting_for = route, ""
            entry.pages.move(route)

    async def _take_back(self, existing: set[str]) -> None:
        """Lines whose resource was deleted, and its queue with it, wait again."""
        gone = [run for run in self._owner.runs() if run.prepared.resource_id not in existing]
        for run in gone:
            await self._owner.give_up(run, "failed", "resource_deleted")
        if gone:
            await self._endings.put_back(gone, "resource_deleted")

    async def _progress(self, entry: _Open) -> None:
        """Note how fast it goes, and end a batch that has no line left."""
        batch, pages = entry.batch, entry.pages
        noted = (*self._results.rates(batch.batch_id), entry.waiting_for)
        now_s = time.monotonic()
        if noted != entry.noted and now_s - entry.noted_s > NOTE_S:
            await self._store.note_progress(batch.batch_id, *noted)
            entry.noted, entry.noted_s = noted, now_s
        if pages is None or not pages.is_read() or self._results.pending(batch.batch_id):
            return
        if self._owner.runs_of(batch.batch_id):
            return
        if await self._store.is_done(batch.batch_id):
            await self._store.begin_finalizing(batch.batch_id)
        else:
            pages.restart()

    # ---- lines out

    def _read_ahead(self, group: asyncio.TaskGroup) -> None:
        for entry in self._open.values():
            if entry.pages is not None and entry.route is not None and entry.pages.needs_lines():
                entry.pages.loading = True
                group.create_task(self._load(entry.pages))

    async def _load(self, pages: Pages) -> None:
        try:
            for refused in await pages.load():
                self._endings.refuse(pages.batch, refused)
        except (Unavailable, ApiError, MissingFile) as error:
            log.warning("page_held", batch_id=pages.batch.batch_id, error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(LOOK_S)
        finally:
            pages.loading = False
            self.wake()

    async def _send_lines(self, group: asyncio.TaskGroup) -> None:
        if self._results.waiting > MAX_UNWRITTEN:
            return
        out = Counter(run.prepared.resource_id for run in self._owner.runs())
        ready: dict[str, dict[str, list[Pages]]] = defaultdict(lambda: defaultdict(list))
        for entry in self._open.values():
            if entry.route is not None and entry.pages is not None and entry.pages.ready:
                ready[entry.route.resource.resource_id][entry.batch.team_id].append(entry.pages)
        for resource_id, teams in ready.items():
            room = min(self._in_flight - out[resource_id], GROUP_LINES)
            if room <= 0:
                continue
            offers = {
                team: [line.cost_tokens for pages in of_team for line in pages.ready][: room + 1]
                for team, of_team in teams.items()
            }
            turns = self._turns.get(resource_id, Turns())
            chosen, self._turns[resource_id] = deal(offers, turns, room)
            await self._send(group, [_pop(teams[team]) for team in chosen])
            self.wake()

    async def _send(self, group: asyncio.TaskGroup, lines: Sequence[Prepared]) -> None:
        runs = [LineRun(line) for line in lines]
        try:
            noted = await self._store.dispatch([_dispatched(line) for line in lines])
        except Unavailable:
            # Whether it was committed is not known: what is marked as out is put back, and read again.
            group.create_task(self._endings.put_back(runs, "never_published"))
            raise
        runs = [run for run in runs if run.job_id in noted]
        for run in runs:
            self._owner.adopt(run)
        group.create_task(self._publish(runs))

    async def _publish(self, runs: Sequence[LineRun]) -> None:
        await asyncio.gather(*(self._owner.publish(run) for run in runs))


def _pop(batches: Sequence[Pages]) -> Prepared:
    """The next line of a team: its oldest batch's, if that has one."""
    return next(pages for pages in batches if pages.ready).ready.popleft()


def _dispatched(line: Prepared) -> Dispatched:
    first = line.jobs[0]
    return Dispatched(
        batch_id=line.batch.batch_id,
        line=line.line,
        job_id=first.job_id,
        jobs=len(line.jobs),
        request_id=line.request_id,
        resource_id=first.resource_id,
        billing=first.billing,
        accepted_unix_ms=first.accepted_unix_ms,
    )
