"""Writes a batch's output and error files from its lines' rows, and ends the batch.

The names follow from the batch's id, so that a second try writes the same files again.
"""

from __future__ import annotations

import hashlib
from contextlib import AsyncExitStack

import structlog

from services.batch.records import Batch, OutputFile
from services.batch.store import Store
from shared.file_store import FileStore, Writer
from shared.inference.batch_output import output_line

log = structlog.get_logger()

PAGE_LINES = 200


class _Output:
    """A file that is begun at its first line: one without lines is not made."""

    def __init__(self, batch: Batch, kind: str) -> None:
        digits = hashlib.sha256(f"{batch.batch_id}/{kind}".encode()).hexdigest()[:32]
        self.file_id = f"file_{digits}"
        self.filename = f"{batch.batch_id}_{kind}.jsonl"
        self.path = f"{batch.team_id}/{self.file_id}"
        self.bytes = 0
        self._writer: Writer | None = None

    async def write(self, files: FileStore, stack: AsyncExitStack, line: bytes) -> None:
        if self._writer is None:
            self._writer = await stack.enter_async_context(files.writing(self.path))
        await self._writer.write(line + b"\n")
        self.bytes += len(line) + 1

    def made(self) -> OutputFile | None:
        if self._writer is None:
            return None
        return OutputFile(self.file_id, self.filename, self.bytes, self.path)


class Finisher:
    def __init__(self, store: Store, files: FileStore) -> None:
        self._store, self._files = store, files

    async def finish(self, batch: Batch) -> None:
        """All lines have ended: write the files, name them, end the batch. Raises `Unavailable`; then try again."""
        output, errors = _Output(batch, "output"), _Output(batch, "error")
        async with AsyncExitStack() as stack:
            after_line = 0
            while rows := await self._store.results(batch.batch_id, after_line, PAGE_LINES):
                after_line = rows[-1]["line"]
                for row in rows:
                    line = output_line(
                        row["custom_id"], row["state"], row["request_id"], row["status_code"], row["response"]
                    )
                    target = output if row["state"] == "succeeded" else errors
                    await target.write(self._files, stack, line)
        await self._store.finish(batch, output.made(), errors.made())
        log.info("batch_finished", batch_id=batch.batch_id, state=batch.state)
