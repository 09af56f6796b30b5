"""Who answers `podwire conntrack`: an agent, or this process about its own namespace."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from podwire.agent import control
from podwire.cli import agents
from podwire.conntrack.inspector import Inspector
from podwire.conntrack.names import Names
from podwire.errors import ApiError
from podwire.kernel import address
from podwire.kernel.ctnetlink import Table

_SAMPLES, _SAMPLE_PERIOD_S = 5, 0.4


class Reader(Protocol):
    """`conntrack.inspector.Inspector`'s answers. `names`: whether it knows pods and Services."""

    names: bool

    def ask(self, what: str, query: dict[str, str] | None = None) -> Any: ...
    def stream(self, what: str, query: dict[str, str]) -> Iterator[dict[str, Any]]: ...


class AgentReader:
    """Asks an agent."""

    names = True

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def ask(self, what: str, query: dict[str, str] | None = None) -> Any:
        return control.ask(self._socket, f"/v1/conntrack/{what}", query or {})

    def stream(self, what: str, query: dict[str, str]) -> Iterator[dict[str, Any]]:
        source = control.follow(self._socket, f"/v1/conntrack/{what}", query)

        async def following() -> dict[str, Any]:
            return await anext(source)

        with asyncio.Runner() as runner:
            while True:
                try:
                    row = runner.run(following())
                except StopAsyncIteration:
                    return
                if "error" in row:
                    raise ApiError(row["error"])
                yield row


class OwnReader:
    """Reads the table of the caller's namespace; addresses have no names."""

    names = False

    def __init__(self, table: Table) -> None:
        names = Names(own_addresses=address.own())
        self._inspector = Inspector(table, lambda: names)

    def ask(self, what: str, query: dict[str, str] | None = None) -> Any:
        query = query or {}
        match what:
            case "status":
                for _ in range(_SAMPLES):
                    self._inspector.sample()
                    time.sleep(_SAMPLE_PERIOD_S)
                return self._inspector.status()
            case "top":
                return self._inspector.top(query)
            case "advise":
                return self._inspector.apply() if query.get("apply") else self._inspector.advise()
            case _:
                return self._inspector.flush(query)

    def stream(self, what: str, query: dict[str, str]) -> Iterator[dict[str, Any]]:
        if what == "ls":
            return self._inspector.ls(query)
        return self._inspector.watch(query, lambda: False)


@contextmanager
def choose(args: argparse.Namespace) -> Generator[Reader]:
    """The agent asked for; without options and without an agent, the own namespace."""
    named = args.run_dir or args.lab or args.node
    socket = None if args.raw else agents.socket(args)
    if socket is not None and (named or socket.exists()):
        if not socket.exists():
            raise ApiError(f"no agent answers at {socket}")
        yield AgentReader(socket)
        return
    with Table() as table:
        yield OwnReader(table)
