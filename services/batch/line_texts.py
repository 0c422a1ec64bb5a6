"""Where the text of a batch's lines is: in its input file, or, if they came through the queue, in rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from services.batch.records import Batch, LineRef
from shared.file_store import FileStore


class Rows(Protocol):
    """`submission.tables.SubmissionTables`."""

    async def texts(self, batch_id: str, lines: Sequence[int]) -> Mapping[int, bytes]: ...


class LineTexts:
    def __init__(self, files: FileStore, rows: Rows) -> None:
        self._files, self._rows = files, rows

    async def read(self, batch: Batch, page: Sequence[LineRef]) -> list[tuple[int, bytes]]:
        """Return the lines of one page, by number. Raises `Unavailable`, `MissingFile`."""
        if not batch.input_path:
            texts = await self._rows.texts(batch.batch_id, [each.line for each in page])
            return [(each.line, texts[each.line]) for each in page]
        start = page[0].offset
        text = await self._files.read_range(
            batch.input_path, start, page[-1].offset + page[-1].length - start
        )
        return [(each.line, text[each.offset - start : each.offset - start + each.length]) for each in page]
