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
from services.batch.line_run import LineRun, error_body, voids_of_lost
from services.batch.line_texts import LineTexts
from services.batch.own_resources import OwnResources
from services.batch.owner import LineOwner
from services.batch.pages import Pages
from services.batch.paying import LinePayer, Paid, Unpaid, starting_at
from services.batch.preparation import Prepared, Preparer
from services.batch.records import Batch, Dispatched, Reserved
from services.batch.results import Results
from services.batch.routing import OwnGpus, Payer, Purse, Waiting, choose_paid_route
from services.batch.states import LineEnd
from services.batch.store import Store
from services.batch.submission.tables import SubmissionTables
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
UNPAID_S = 1.0
"""So long nothing of a batch is tried again of which a line had no room under a cap."""
MODEL_GONE = ApiError(
    404, "model_not_found", "The model, or the revision that the batch began with, was deleted."
)


@dataclass(slots=True)
class _Open:
    """A batch that is not over, as its dispatcher sees it."""

    batch: Batch
    pages: Pages | None = None
    route: Route | None = None
    waiting_for: str = ""
    noted_s: float = 0.0
    noted: tuple[float, float, str] | None = None
    counted_s: float = 0.0
    """When the rows were last asked whether a line is left, while none of them could go out."""
    unpaid: str = ""
    """Why its latest line had to wait for a budget; empty once one went out."""
    unpaid_until_s: float = 0.0

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
        payer: LinePayer,
        own: OwnResources,
        queued: SubmissionTables,
        in_flight: int,
    ) -> None:
        """in_flight: lines of one resource that are out at once; more on a batch's own, where its GPUs have room for more.
        queued: of batches whose lines are in no file."""
        self._store, self._views, self._queued = store, views, queued
        self._texts = LineTexts(files, queued)
        self._owner, self._results, self._endings = owner, results, endings
        self._preparer, self._payer = preparer, payer
        self._own = own
        self._in_flight = in_flight
        self._validator = Validator(store, views, files, own)
        self._finisher = Finisher(store, files)
        self._files_at_once = asyncio.Semaphore(FILES_AT_ONCE)
        self._busy: set[str] = set()
        """Batches whose files are being checked or written."""
        self._open: dict[str, _Open] = {}
        """By id, oldest first."""
        self._turns: dict[str, Turns] = {}
        """By resource."""
        self._reserving: dict[str, Prepared] = {}
        """Lines that wait for billing's word, by the first job's id."""
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

    def has_more(self, batch_id: str) -> None:
        """Lines were added to this batch."""
        entry = self._open.get(batch_id)
        if entry is not None and entry.pages is not None:
            entry.pages.more()
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
        revisions = await self._views.existing(
            {(b.model_id, b.revision) for b in batches if b.model_id and b.revision}
        )
        await self._own.refresh()
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
                if (batch.model_id, batch.revision) not in revisions:
                    await self._without_model(entry)
                    continue
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

    async def _without_model(self, entry: _Open) -> None:
        """Fail the lines that wait for a model, or a revision, that was deleted; what runs is finished."""
        batch_id = entry.batch.batch_id
        entry.halt()
        await self._store.fail_waiting(batch_id, MODEL_GONE.status, error_body(MODEL_GONE))
        out = self._owner.runs_of(batch_id) or self._results.pending(batch_id) or self._is_reserving(batch_id)
        if not out and await self._store.is_done(batch_id):
            await self._store.begin_finalizing(batch_id)

    async def _route(
        self, entry: _Open, resources: Iterable[ResourceView], ppt_fallback: bool, purse: Purse
    ) -> None:
        batch = entry.batch
        if entry.pages is None:
            model = await self._views.model(batch.model_id or "", batch.revision or 0)
            if model is None:  # since this look began: the next one sees it
                return
            entry.pages = Pages(batch, model, self._store, self._texts, self._preparer)
        payer = Payer(batch.team_id, batch.key_id, batch.model_id or "")
        own = None
        if self._own.is_owner(batch.batch_id):
            own = OwnGpus(self._own.resource_of(batch.batch_id))
        route = choose_paid_route(payer, ppt_fallback, batch.model_type or "", resources, purse, own)
        if isinstance(route, Waiting):
            entry.route, entry.waiting_for = None, route.reason
        elif entry.unpaid and time.monotonic() < entry.unpaid_until_s:
            entry.route, entry.waiting_for = None, entry.unpaid
        else:
            entry.route, entry.waiting_for = route, entry.unpaid
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
        if pages is None or pages.loading or self._results.pending(batch.batch_id):
            return
        if entry.route is not None:
            if not pages.is_read():
                return
        elif now_s - entry.counted_s > NOTE_S:  # nothing is read ahead without a route, so the rows are asked
            entry.counted_s = now_s
        else:
            return
        if self._owner.runs_of(batch.batch_id) or self._is_reserving(batch.batch_id):
            return
        if not await self._store.is_done(batch.batch_id):
            if entry.route is not None:
                pages.restart()
        elif batch.input_path or await self._queued.stop_collecting(batch.batch_id):
            await self._store.begin_finalizing(batch.batch_id)

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
        out.update(line.resource_id for line in self._reserving.values())
        # One group of a team at a time: while billing is silent it takes no more of the room that others could have.
        reserving = {line.batch.team_id for line in self._reserving.values()}
        ready: dict[str, dict[str, list[Pages]]] = defaultdict(lambda: defaultdict(list))
        for entry in self._open.values():
            if entry.batch.team_id in reserving:
                continue
            if entry.route is not None and entry.pages is not None and entry.pages.ready:
                ready[entry.route.resource.resource_id][entry.batch.team_id].append(entry.pages)
        for resource_id, teams in ready.items():
            most = max(self._in_flight, self._own.lines_at_once(resource_id))
            room = min(most - out[resource_id], GROUP_LINES)
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
        """Lines under a cap go out beside the rounds: they may have to wait for billing, and others need not."""
        now_unix_ms = time.time_ns() // 1_000_000
        capped, free = [], []
        for line in lines:
            if self._payer.is_capped(line):
                capped.append(starting_at(line, now_unix_ms, self._payer.longest_s))
            else:
                free.append(starting_at(line, now_unix_ms, None))
        if capped:
            self._reserving.update({line.jobs[0].job_id: line for line in capped})
            group.create_task(self._send_capped(group, capped))
        if free:
            await self._go_out(group, free)

    async def _send_capped(self, group: asyncio.TaskGroup, lines: Sequence[Prepared]) -> None:
        try:
            answers = await asyncio.gather(*(self._payer.reserve(line) for line in lines))
            self._wait_for_budgets([each for each in answers if isinstance(each, Unpaid)])
            paid = [each for each in answers if isinstance(each, Paid)]
            if paid:
                await self._go_out(group, [each.line for each in paid], paid)
        except Unavailable as error:
            log.warning("batches_held", error=str(error))
        finally:
            for line in lines:
                del self._reserving[line.jobs[0].job_id]
            self.wake()

    def _wait_for_budgets(self, unpaid: Sequence[Unpaid]) -> None:
        lines: dict[str, list[Prepared]] = defaultdict(list)
        for each in unpaid:
            entry = self._open.get(each.line.batch.batch_id)
            if entry is not None and entry.pages is not None:
                lines[entry.batch.batch_id].append(each.line)
                if not entry.unpaid:
                    log.info("batch_waits_for_money", batch_id=entry.batch.batch_id, reason=each.reason)
                entry.unpaid, entry.unpaid_until_s = each.reason, time.monotonic() + UNPAID_S
                entry.route, entry.waiting_for = None, each.reason
        for batch_id, of_batch in lines.items():
            pages = self._open[batch_id].pages
            assert pages is not None
            pages.give_back(of_batch)

    def _is_reserving(self, batch_id: str) -> bool:
        return any(line.batch.batch_id == batch_id for line in self._reserving.values())

    async def _go_out(
        self, group: asyncio.TaskGroup, lines: Sequence[Prepared], paid: Sequence[Paid] = ()
    ) -> None:
        runs = [LineRun(line) for line in lines]
        try:
            noted = await self._store.dispatch([_dispatched(line) for line in lines])
        except Unavailable:
            # Whether it was committed is not known: what is marked as out is put back, and read again. Each of its
            # jobs is voided, and by that what is reserved for it is freed.
            for each in paid:
                each.sent()
            group.create_task(self._endings.put_back(runs, "never_published"))
            raise
        for each in paid:
            if each.line.jobs[0].job_id not in noted:
                each.kept()
                continue
            each.sent()
            entry = self._open.get(each.line.batch.batch_id)
            if entry is not None:
                entry.unpaid = ""
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
        reserved=Reserved(first.lease_ids, [job.reserved_nanousd for job in line.jobs]),
    )
