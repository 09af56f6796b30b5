"""A node as the kubelet sees it: its namespace, its CNI configuration, whether it is ready."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from podwire.kernel import netns
from podwire.lab.runtime import cni
from podwire.lab.state import LabDir, Node

T = TypeVar("T")

CNI_THREADS = 4  # plugins that run at once on one node
REFERENCE_PLUGINS = Path("/usr/lib/cni")


class NodeHost:
    """One node's share of the runtime. `ready` is set while the node's network can take pods."""

    def __init__(self, lab: LabDir, node: Node) -> None:
        self.node = node
        self.name = node.name
        self.netns_fd = netns.open_path(lab.netns(f"node-{node.name}"))
        self.conf_dir = lab.node(node.name) / "cni" / "net.d"
        self.conf_dir.mkdir(parents=True, exist_ok=True)
        self.network: cni.NetworkList | None = None
        self.ready = asyncio.Event()
        self.reported: bool | None = None  # what the API was last told
        self.plugins = cni.Plugins(
            (lab.path / "bin", REFERENCE_PLUGINS),
            lab.run_dir(node.name) / "cni.sock",
        )
        # children of these threads are born in the node's namespace
        self._threads = ThreadPoolExecutor(
            CNI_THREADS, f"cni-{node.name}", initializer=netns.enter, initargs=(self.netns_fd,)
        )

    async def run(self, call: Callable[[], T]) -> T:
        """Run a blocking call in the node's network namespace."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def look(self) -> tuple[bool, str]:
        """Read the CNI configuration and ask the plugins: ready or not, and why not."""
        self.network = cni.load(self.conf_dir)
        if self.network is None:
            self.ready.clear()
            return False, "no CNI configuration: the agent has not written its conflist"
        network = self.network
        try:
            await self.run(lambda: self.plugins.status(network))
        except cni.CniError as error:
            self.ready.clear()
            return False, str(error)
        self.ready.set()
        return True, ""

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        os.close(self.netns_fd)


_IN_CLOSE_WRITE, _IN_MOVED_FROM, _IN_MOVED_TO, _IN_DELETE = 0x8, 0x40, 0x80, 0x200
_HEADER = struct.Struct("=iIII")


class Watcher:
    """Calls back when a file in one of the directories is written or removed (inotify(7))."""

    def __init__(self, changed: Callable[[Path], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._paths: dict[int, Path] = {}
        self._changed = changed
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def add(self, directory: Path) -> None:
        mask = _IN_CLOSE_WRITE | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_DELETE
        number = self._libc.inotify_add_watch(self._fd, os.fsencode(directory), mask)
        if number < 0:
            raise OSError(ctypes.get_errno(), f"inotify_add_watch {directory}")
        self._paths[number] = directory

    def _read(self) -> None:
        for number in set(self._events(os.read(self._fd, 65536))):
            if number in self._paths:
                self._changed(self._paths[number])

    @staticmethod
    def _events(data: bytes) -> Iterator[int]:
        offset = 0
        while offset < len(data):
            number, _, _, length = _HEADER.unpack_from(data, offset)
            yield number
            offset += _HEADER.size + length
