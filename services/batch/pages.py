"""The next lines of one batch, read ahead and prepared while others run. Knows the file and the rows, not the queues."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import structlog

from services.batch.fairness import by_prefix
from services.batch.line_texts import LineTexts
from services.batch.preparation import Prepared, Preparer, Refused
from services.batch.records import Batch, LineRef
from services.batch.store import Store
from shared.inference.principal import ModelView, Route

log = structlog.get_logger()

PAGE_LINES = 128
PAGE_BYTES = 2 * 1024 * 1024
"""Of the file that one page may span."""


class Pages:
    """`ready` is what can go out. `load` is called again and again; it reads on after the last line it has seen."""

    def __init__(
        self, batch: Batch, model: ModelView, store: Store, texts: LineTexts, preparer: Preparer
    ) -> None:
        self.batch = batch
        self.model = model
        self.ready: deque[Prepared] = deque()
        self.loading = False
        self.exhausted = False
        """No line waits behind those that were read. `restart` looks again from the beginning."""
        self._store, self._texts, self._preparer = store, texts, preparer
        self._after_line = 0
        self._restarts = 0
        """A page that was being read at a restart is forgotten."""
        self._additions = 0
        """A page that was found empty beside an addition says nothing of what was added."""
        self._route: Route | None = None

    def needs_lines(self) -> bool:
        return not self.loading and not self.exhausted and len(self.ready) < PAGE_LINES // 2

    def give_back(self, lines: Sequence[Prepared]) -> None:
        """Lines that were taken from `ready` and did not go out. They are prepared for the resource of then."""
        route = self._route
        if route is None or any(line.resource_id != route.resource.resource_id for line in lines):
            self.restart()
        else:
            self.ready.extendleft(reversed(lines))

    def is_read(self) -> bool:
        """Whether every line that waited when it was looked for has gone out."""
        return self.exhausted and not self.ready and not self.loading

    def more(self) -> None:
        """There are lines behind the last one."""
        self._additions += 1
        self.exhausted = False

    def restart(self) -> None:
        """Forget what was read ahead: lines came back, or they run elsewhere now."""
        self.ready.clear()
        self._after_line = 0
        self._restarts += 1
        self.exhausted = False

    def move(self, route: Route) -> None:
        """Lines are prepared for one resource, whose context they must fit in."""
        if self._route is not None and self._route.resource.resource_id != route.resource.resource_id:
            self.restart()
        self._route = route

    async def load(self) -> list[Refused]:
        """Read and prepare one page; return the lines of it that cannot run.

        Raises `Unavailable`, `MissingFile`, or ApiError 503 when the tokenizers are busy; then nothing was read.
        """
        route, after_line = self._route, self._after_line
        restarts, additions = self._restarts, self._additions
        assert route is not None
        lines = await self._store.waiting_lines(self.batch.batch_id, after_line, PAGE_LINES)
        page = cut_page(lines)
        if not page:
            self.exhausted = (self._restarts, self._additions) == (restarts, additions)
            return []
        texts = await self._texts.read(self.batch, page)
        found = await self._preparer.prepare(self.batch, self.model, route, texts)
        if self._restarts != restarts:
            return []
        self._after_line = page[-1].line
        self.ready += by_prefix([each for each in found if isinstance(each, Prepared)])
        return [each for each in found if isinstance(each, Refused)]


def cut_page(lines: Sequence[LineRef]) -> list[LineRef]:
    """The first of these lines whose texts lie close enough together to be read at once; one at least. Pure."""
    page: list[LineRef] = []
    size = 0
    for each in lines:
        size += each.length  # of lines that are in no file all offsets are the same
        if page and max(size, each.offset + each.length - page[0].offset) > PAGE_BYTES:
            break
        page.append(each)
    return page
