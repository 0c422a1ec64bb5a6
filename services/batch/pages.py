"""The next lines of one batch, read ahead and prepared while others run. Knows the file and the rows, not the queues."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import structlog

from services.batch.fairness import by_prefix
from services.batch.preparation import Prepared, Preparer, Refused
from services.batch.records import Batch, LineRef
from services.batch.store import Store
from shared.file_store import FileStore
from shared.inference.principal import ModelView, Route

log = structlog.get_logger()

PAGE_LINES = 128
PAGE_BYTES = 2 * 1024 * 1024
"""Of the file that one page may span."""


class Pages:
    """`ready` is what can go out. `load` is called again and again; it reads on after the last line it has seen."""

    def __init__(
        self, batch: Batch, model: ModelView, store: Store, files: FileStore, preparer: Preparer
    ) -> None:
        self.batch = batch
        self.model = model
        self.ready: deque[Prepared] = deque()
        self.loading = False
        self.exhausted = False
        """No line waits behind those that were read. `restart` looks again from the beginning."""
        self._store, self._files, self._preparer = store, files, preparer
        self._after_line = 0
        self._restarts = 0
        """A page that was being read at a restart is forgotten."""
        self._route: Route | None = None

    def needs_lines(self) -> bool:
        return not self.loading and not self.exhausted and len(self.ready) < PAGE_LINES // 2

    def is_read(self) -> bool:
        """Whether every line that waited when it was looked for has gone out."""
        return self.exhausted and not self.ready and not self.loading

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
        route, after_line, restarts = self._route, self._after_line, self._restarts
        assert route is not None
        lines = await self._store.waiting_lines(self.batch.batch_id, after_line, PAGE_LINES)
        page = cut_page(lines)
        if not page:
            self.exhausted = self._restarts == restarts
            return []
        start = page[0].offset
        text = await self._files.read_range(
            self.batch.input_path, start, page[-1].offset + page[-1].length - start
        )
        found = await self._preparer.prepare(
            self.batch,
            self.model,
            route,
            [(each.line, text[each.offset - start : each.offset - start + each.length]) for each in page],
        )
        if self._restarts != restarts:
            return []
        self._after_line = page[-1].line
        self.ready += by_prefix([each for each in found if isinstance(each, Prepared)])
        return [each for each in found if isinstance(each, Refused)]


def cut_page(lines: Sequence[LineRef]) -> list[LineRef]:
    """The first of these lines whose texts lie close enough together to be read at once; one at least. Pure."""
    page: list[LineRef] = []
    for each in lines:
        if page and each.offset + each.length - page[0].offset > PAGE_BYTES:
            break
        page.append(each)
    return page
