"""`roundhouse batch submit --queue` and `results --queue`: a file's lines as messages, and what the reply queue has for them."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from services.cli.batch_file import Part, message_of, parts_of
from services.cli.client import CliError
from services.cli.settings import QueueUser
from shared.outcomes import PublishRefused, Unavailable, Unroutable
from shared.queue_client import QueueClient

TRY_AGAIN_S = 2.0
LATER = ("over_quota", "too_many_batches")
"""Refusals of what may be published again when other lines are over."""
T = TypeVar("T")


class _Refused(CliError):
    """A message was, and will be whenever it comes."""


@dataclass(slots=True)
class Standing:
    """What is known of a file's messages, by their ids."""

    parts: dict[str, Part]
    accepted: set[str] = field(default_factory=set)
    batch_ids: list[str] = field(default_factory=list)
    seen: set[tuple[str, int]] = field(default_factory=set)
    completed: int = 0
    failed: int = 0

    @property
    def lines(self) -> int:
        return sum(part.lines for part in self.parts.values())

    def accept(self, said: dict[str, Any]) -> None:
        self.accepted.add(said["id"])
        if said["batch_id"] not in self.batch_ids:
            self.batch_ids.append(said["batch_id"])

    def is_new(self, said: dict[str, Any]) -> bool:
        """Count a result, unless it was told before."""
        key = (said["id"], said["line"])
        if key in self.seen:
            return False
        self.seen.add(key)
        response = said["result"]["response"]
        if response is not None and response["status_code"] == 200:
            self.completed += 1
        else:
            self.failed += 1
        return True


def submit(
    user: QueueUser, file: Path, window: str, submission_id: str | None, out: BinaryIO | None
) -> dict[str, Any]:
    """Publish a file and wait until all of it is accepted; with `out` also for its results, which go there.

    Returns what became of it. Raises `CliError`; the same id then submits the same lines, each once.
    """
    name = submission_id or uuid.uuid4().hex
    standing = Standing({f"{name}/{part.number}": part for part in parts_of(file)})
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("accepting", total=len(standing.parts))

        def draw() -> None:
            if out is None or len(standing.accepted) < len(standing.parts):
                bar.update(task, completed=len(standing.accepted))
            else:
                bar.update(task, description="running", total=standing.lines, completed=len(standing.seen))

        try:
            _run(_submit(user, file, window, standing, out, draw))
        except (CliError, KeyboardInterrupt) as error:
            said = ["interrupted" if isinstance(error, KeyboardInterrupt) else str(error)]
            if standing.batch_ids:
                said.append(f"accepted lines run: {', '.join(standing.batch_ids)}")
            if not isinstance(error, _Refused):
                said.append(f"--id {name} submits the same lines, each once")
            raise CliError("; ".join(said)) from error
    return {
        "id": name,
        "batches": standing.batch_ids,
        "lines": standing.lines,
        "completed": standing.completed if out else None,
        "failed": standing.failed if out else None,
    }


def take_results(user: QueueUser, out: BinaryIO) -> int:
    """Write the results that wait in the reply queue, and take them from there when they are written; return how many."""
    return _run(_take_results(user, out))


async def _submit(
    user: QueueUser,
    file: Path,
    window: str,
    standing: Standing,
    out: BinaryIO | None,
    draw: Callable[[], None],
) -> None:
    todo: asyncio.Queue[str] = asyncio.Queue()
    for name in standing.parts:
        todo.put_nowait(name)
    async with AsyncExitStack() as stack:
        client = await QueueClient.open(user.url, user.exchange, user.reply_queue, stack)
        async with asyncio.TaskGroup() as group:
            publishing = group.create_task(_publish(client, file, window, standing, todo))
            await _listen(client, standing, todo, out, draw)
            publishing.cancel()


async def _publish(
    client: QueueClient, file: Path, window: str, standing: Standing, todo: asyncio.Queue[str]
) -> None:
    while True:
        name = await todo.get()
        message = await asyncio.to_thread(message_of, file, standing.parts[name], name, window)
        while True:
            try:
                await client.publish(message)
                break
            except PublishRefused:  # the team's queue is full
                await asyncio.sleep(TRY_AGAIN_S)


async def _listen(
    client: QueueClient,
    standing: Standing,
    todo: asyncio.Queue[str],
    out: BinaryIO | None,
    draw: Callable[[], None],
) -> None:
    """Until all is accepted, and, with `out`, until all results are there. What is for others is left where it lies."""
    loop = asyncio.get_running_loop()
    async for answer in client.answers():
        said = json.loads(answer.body)
        part = standing.parts.get(said["id"] or "")
        if part is None:
            continue
        match said["type"]:
            case "accepted":
                standing.accept(said)
            case "refused" if said["code"] in LATER:
                loop.call_later(TRY_AGAIN_S, todo.put_nowait, said["id"])
            case "refused":
                await answer.ack()
                raise _Refused(_words(said, part))
            case "result" if out is None:
                continue
            case "result":
                if standing.is_new(said):
                    _write(out, said)
        await answer.ack()
        draw()
        if len(standing.accepted) == len(standing.parts) and (
            out is None or len(standing.seen) == standing.lines
        ):
            return


async def _take_results(user: QueueUser, out: BinaryIO) -> int:
    taken = []
    async with AsyncExitStack() as stack:
        client = await QueueClient.open(user.url, user.exchange, user.reply_queue, stack)
        async for answer in client.take():
            said = json.loads(answer.body)
            if said["type"] == "result":
                _write(out, said)
                taken.append(answer)
        out.flush()
        for answer in taken:
            await answer.ack()
    return len(taken)


def _write(out: BinaryIO | None, said: dict[str, Any]) -> None:
    assert out is not None
    out.write(json.dumps(said["result"], ensure_ascii=False).encode() + b"\n")
    out.flush()


def _words(said: dict[str, Any], part: Part) -> str:
    where = f"lines from {part.first_line} on: {said['code']}: {said['message']}"
    errors: Iterable[dict[str, Any]] = said["errors"][:1]
    return where + "".join(f" ({each['code']}: {each['message']})" for each in errors)


def _run(work: Coroutine[Any, Any, T]) -> T:
    try:
        return asyncio.run(work)
    except (Unavailable, Unroutable, CliError, ExceptionGroup) as error:
        cause: BaseException = error
        while isinstance(cause, BaseExceptionGroup):  # of the tasks that publish and listen
            cause = cause.exceptions[0]
        if isinstance(cause, CliError):
            raise cause from None
        if isinstance(cause, Unavailable | Unroutable):
            raise CliError(f"the queue: {cause}") from error
        raise


@contextmanager
def opened(out: Path | None) -> Iterator[BinaryIO]:
    """Standard output, or a file that lines are added to: what is taken from the queue is nowhere else there. Raises `CliError`."""
    if out is None:
        yield sys.stdout.buffer
        return
    try:
        with out.open("ab") as place:
            yield place
    except OSError as error:
        raise CliError(f"{out} cannot be written: {error.strerror}") from error
