"""The agent's control socket: JSON over HTTP on a unix socket that only root may open.

The CLI asks here (`podwire status`, `services`, `policy`, …). Handlers are plain functions from the
query to something JSON can hold; a PodwireError becomes status 400 with its sentence.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientSession,
    ClientTimeout,
    UnixConnector,
    web,
)

from podwire.errors import ApiError, PodwireError

Query = Mapping[str, str]
Handler = Callable[[Query], object | Awaitable[object]]
Stream = Callable[[Query], AsyncIterator[object]]


class ControlServer:
    """Serves handlers at ``<run-dir>/agent.sock``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handlers: dict[str, Handler] = {}
        self._streams: dict[str, Stream] = {}
        self._runner: web.AppRunner | None = None

    def route(self, path: str, handler: Handler) -> None:
        """Answer GET and POST of `path` with what `handler` returns (or awaits) as JSON.

        The query is the URL's; a POST's body, if any, is given under the key ``body``.
        """
        self._handlers[path] = handler

    def stream(self, path: str, source: Stream) -> None:
        """Answer GET of `path` with one JSON document per line, for as long as `source` yields."""
        self._streams[path] = source

    async def _dispatch(self, request: web.Request) -> web.StreamResponse:
        """Rooms register while the server already answers: the agent is asked while it starts."""
        if request.path in self._streams:
            return await self._stream(request, self._streams[request.path])
        handler = self._handlers.get(request.path)
        if handler is None:
            what = f"nothing answers {request.path} here: this agent runs without that part"
            return web.json_response({"error": what}, status=404)
        query = dict(request.query)
        if request.can_read_body:
            query["body"] = await request.text()
        try:
            result = handler(query)
            if inspect.isawaitable(result):
                result = await result
        except PodwireError as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response(result)

    async def _stream(self, request: web.Request, source: Stream) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        async for item in source(request.query):
            await response.write(json.dumps(item).encode() + b"\n")
        return response

    async def start(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._dispatch)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        before = os.umask(0o177)  # the socket is born with mode 0600
        try:
            await web.UnixSite(self._runner, str(self._path)).start()
        finally:
            os.umask(before)

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        self._path.unlink(missing_ok=True)


def ask(
    socket: Path, path: str, query: Query | None = None, body: str | None = None
) -> Any:  # the JSON of any handler
    """What the agent behind `socket` answers. Raises ApiError, also when no agent answers."""
    return asyncio.run(_ask(socket, path, query or {}, body))


async def _ask(socket: Path, path: str, query: Query, body: str | None) -> Any:
    timeout = ClientTimeout(total=60)
    try:
        async with (
            ClientSession(connector=UnixConnector(str(socket)), timeout=timeout) as session,
            session.request(
                "GET" if body is None else "POST", f"http://agent{path}", params=query, data=body
            ) as response,
        ):
            text = await response.text()
            status = response.status
    except (ClientError, OSError) as error:
        raise _silent(socket, error) from None
    try:
        answer = json.loads(text)
    except ValueError:
        raise ApiError(f"{path}: {text.strip()}", status=status) from None
    if status != 200:
        raise ApiError(answer.get("error", text), status=status)
    return answer


def _silent(socket: Path, error: ClientError | OSError) -> ApiError:
    cause = error.os_error if isinstance(error, ClientConnectorError) else error
    why = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else str(cause)
    hint = " (root is needed)" if isinstance(cause, PermissionError) else ""
    return ApiError(f"no agent answers at {socket}: {why}{hint}")


async def follow(socket: Path, path: str, query: Query) -> AsyncIterator[Any]:
    """The documents of a stream, as they come. Raises ApiError when no agent answers."""
    timeout = ClientTimeout(total=None)
    try:
        async with (
            ClientSession(connector=UnixConnector(str(socket)), timeout=timeout) as session,
            session.get(f"http://agent{path}", params=query) as response,
        ):
            if response.status != 200:
                raise ApiError(await response.text(), status=response.status)
            async for line in response.content:
                yield json.loads(line)
    except (ClientError, OSError) as error:
        raise _silent(socket, error) from None
