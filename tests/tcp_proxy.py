"""A TCP proxy that can go wrong: for tests of what happens when a server is away, frozen or cut off.

Each accepted connection is a `Link`; links are listed in the order in which clients connected, so a test can hurt one
of them alone. All of it runs on the test's own event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import urllib.parse
from collections.abc import AsyncIterator
from typing import Self

_CHUNK_BYTES = 64 * 1024
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER with 0 seconds: close() sends RST


class Link:
    """One client's connection and ours to the server behind."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter, *, flows: bool) -> None:
        self._client = client
        self._server = server
        self._flows = asyncio.Event()
        if flows:
            self._flows.set()

    def blackhole(self) -> None:
        """Nothing passes any more, in either direction; neither end is told. What was sent waits."""
        self._flows.clear()

    def heal(self) -> None:
        """Everything passes again, first what was held back."""
        self._flows.set()

    def reset(self) -> None:
        """Both ends see "connection reset by peer"."""
        for writer in (self._client, self._server):
            with contextlib.suppress(OSError):  # that end is gone already
                sock: socket.socket = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Copy one direction until it ends; an end closes the whole link."""
        try:
            while data := await reader.read(_CHUNK_BYTES):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass  # the other end is told below
        finally:
            self._client.close()
            self._server.close()


class TcpProxy:
    """Listens on a port of its own and passes everything on to one server."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows = True
        self.port = 0
        self.links: list[Link] = []
        """Open links, the oldest first."""

    @classmethod
    @contextlib.asynccontextmanager
    async def before(cls, url: str) -> AsyncIterator[Self]:
        """A proxy in front of the server that `url` names, closed at the end."""
        parts = urllib.parse.urlsplit(url)
        assert parts.hostname and parts.port
        proxy = cls(parts.hostname, parts.port)
        await proxy.pass_on()
        try:
            yield proxy
        finally:
            await proxy.close()

    def url(self, url: str) -> str:
        """`url` with the proxy in place of its server."""
        parts = urllib.parse.urlsplit(url)
        user = parts.netloc.rpartition("@")[0]
        netloc = f"{user}@127.0.0.1:{self.port}" if user else f"127.0.0.1:{self.port}"
        return parts._replace(netloc=netloc).geturl()

    async def pass_on(self) -> None:
        """Accept connections and pass everything on: the healthy state, and the end of every other one."""
        self._flows = True
        for link in self.links:
            link.heal()
        if self._listener is None:
            self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
            self.port = self._listener.sockets[0].getsockname()[1]

    def blackhole(self) -> None:
        """All links, and those that are still to come, are open but dead."""
        self._flows = False
        for link in self.links:
            link.blackhole()

    def reset(self) -> None:
        """Cut all links; whoever connects again is served."""
        for link in self.links.copy():
            link.reset()

    def refuse(self) -> None:
        """Cut all links, and refuse new ones: the server's process is gone."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self.reset()

    async def close(self) -> None:
        self.refuse()
        for task in self._tasks.copy():
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            server_in, server_out = await asyncio.open_connection(*self._target)
        except OSError:
            client_out.transport.abort()
            return
        link = Link(client_out, server_out, flows=self._flows)
        self.links.append(link)
        try:
            await asyncio.gather(link.pump(client_in, server_out), link.pump(server_in, client_out))
        except asyncio.CancelledError:
            pass  # by `close`: asyncio's own callback would report a cancelled connection as an error
        finally:
            self.links.remove(link)
