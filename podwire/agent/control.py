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

from aiohttp import ClientError, ClientSession, ClientTimeout, UnixConnector, web

from podwire.errors import ApiError, PodwireError

Query = Mapping[str, str]
Handler = Callable[[Query], object | Awaitable[object]]
Stream = Callable[[Query], AsyncIterator[object]]


class ControlServer:
    """Serves handlers at ``<run-dir>/agent.sock``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._app = web.Application()
        self._runner: web.AppRunner | None = None

    def route(self, path: str, handler: Handler) -> None:
        """Answer GET and POST of `path` with what `handler` returns (or awaits) as JSON.

        The query is the URL's; a POST's body, if any, is given under the key ``body``.
        """

        async def answer(request: web.Request) -> web.Response:
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

        self._app.router.add_get(path, answer)
        self._app.router.add_post(path, answer)

    def stream(self, path: str, source: Stream) -> None:
        """Answer GET of `path` with one JSON document per line, for as long as `source` yields."""

        async def answer(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
            await response.prepare(request)
            async for item in source(request.query):
                await response.write(json.dumps(item).encode() + b"\n")
            return response

        self._app.router.add_get(path, answer)

    async def start(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._runner = web.AppRunner(self._app, access_log=None, shutdown_timeout=1)
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
        raise ApiError(f"no agent answers at {socket}: {error}") from None
    try:
        answer = json.loads(text)
    except ValueError:
        raise ApiError(f"{path}: {text.strip()}", status=status) from None
    if status != 200:
        raise ApiError(answer.get("error", text), status=status)
    return answer


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
        raise ApiError(f"no agent answers at {socket}: {error}") from None
