"""A node for CNI tests: a network namespace and the real CNI server in a process of its own."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from podwire.cni.assembly import STATE_FILE, assemble, boot_time
from podwire.cni.lifecycle import Lifecycle
from podwire.cni.plan import NodeConfig
from podwire.cni.server import SOCKET, CniServer
from podwire.datapath.nftables.spoof import SpoofGuard
from podwire.ipam.state import State
from podwire.kernel import netns
from tests.conformance import REPOSITORY

SHIM = REPOSITORY / "podwire" / "built" / "podwire-cni"
PLUGINS = ("", "-ipam", "-ptp", "-loopback", "-portmap", "-bandwidth", "-tuning", "-firewall")
_NETNS = Path("/run/netns")
_numbers = itertools.count()


def build_shim() -> None:
    """Compile the shim when it is older than its source."""
    folder = REPOSITORY / "podwire" / "cni"
    source = folder / "shim.c"
    newest = max(each.stat().st_mtime for each in (source, folder / "disconnect.h"))
    if SHIM.exists() and SHIM.stat().st_mtime >= newest:
        return
    SHIM.parent.mkdir(exist_ok=True)
    draft = SHIM.with_suffix(f".{os.getpid()}")
    command = ["gcc", "-O2", "-static", "-s", "-Wall", "-Wextra", "-Werror", "-o", draft, source]
    subprocess.run(command, check=True, timeout=60)
    draft.rename(SHIM)


class Namespace:
    """A named network namespace; `path` is what a runtime would pass as CNI_NETNS."""

    def __init__(self, role: str) -> None:
        _NETNS.mkdir(exist_ok=True)
        self.name = f"pwt{os.getpid()}-{next(_numbers)}-{role}"
        self.path = str(_NETNS / self.name)
        self.fd = netns.create_named(self.path)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            netns.remove_named(self.path)

    def run(self, *command: str, timeout_s: float = 10, stdin: str = "") -> str:
        """Standard output of a program that must succeed."""
        done = netns.run(self.fd, command, timeout_s=timeout_s, stdin=stdin)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def shell(self, command: str, timeout_s: float = 20) -> subprocess.CompletedProcess[str]:
        return netns.run(self.fd, ["/bin/sh", "-ec", command], timeout_s=timeout_s)


def _guard() -> SpoofGuard:
    guard = SpoofGuard()
    guard.start()
    return guard


Clock = Callable[[], float]


class Node:
    """`folder` holds run and state directories and the plugins by their names."""

    def __init__(
        self,
        config: Callable[[], NodeConfig] = NodeConfig,
        *,
        guarded: bool = False,
        made_by: Callable[[State, Clock], Lifecycle] | None = None,
    ) -> None:
        build_shim()
        self.namespace = Namespace("node")
        self._folder = tempfile.TemporaryDirectory(prefix="pwt-cni-")
        self.folder = Path(self._folder.name)
        self.plugins = self.folder / "bin"
        self.plugins.mkdir()
        for suffix in PLUGINS:
            (self.plugins / f"podwire{suffix}").symlink_to(SHIM)
        self.socket = self.folder / "run" / SOCKET
        self._config = config
        self._guarded = guarded
        self._made_by = made_by
        self._neighbours: list[Namespace] = []
        self.table_of: Callable[[str], str] = lambda _: ""
        self._skip = self.folder / "skip"
        self._pid = 0
        self.namespace.run("ip", "link", "set", "lo", "up")

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.kill()
        for namespace in (self.namespace, *self._neighbours):
            namespace.close()
        self._folder.cleanup()

    def also_closes(self, neighbour: Namespace) -> None:
        """A namespace that lives as long as the node."""
        self._neighbours.append(neighbour)

    @property
    def running(self) -> bool:
        return self._pid != 0

    def state(self) -> State:
        """The node's state file, opened here: for looking, and for seeding while nothing runs."""
        return State(self.folder / "state" / STATE_FILE)

    def start(self) -> None:
        """Start the server and wait until it listens."""
        read, write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(read)
            self._child(write)
        os.close(write)
        self._pipe = open(read, "rb", buffering=0)  # noqa: SIM115  closed by `_end`
        if (said := self._pipe.read(1)) != b"+":
            said += self._pipe.read()
            self.kill()
            raise RuntimeError(f"the server did not start: {said.decode()}")

    def stop(self) -> None:
        """End the server as an agent ends."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def skip_time(self, seconds: float = 3600) -> None:
        """Let so much pass on the pool's clock."""
        self._skip.write_text(str(seconds))
        os.kill(self._pid, signal.SIGUSR1)
        assert self._pipe.read(1) == b"+"

    def call(
        self, plugin: str, environment: Mapping[str, str], stdin: object
    ) -> subprocess.CompletedProcess[str]:
        """Execute a plugin as a runtime does. `stdin` is text, or a file."""
        everything = {
            "PATH": os.environ.get("PATH", ""),
            "PODWIRE_CNI_SOCKET": str(self.socket),
            **environment,
        }
        given = {"input": stdin} if isinstance(stdin, str) else {"stdin": stdin}
        with netns.entered(self.namespace.fd):
            return subprocess.run(
                [self.plugins / plugin],
                env=everything,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                **given,  # type: ignore[call-overload]
            )

    def _end(self, number: int) -> None:
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)
            os.waitpid(self._pid, 0)
            self._pipe.close()
            self._pid = 0

    def _lifecycle(self, now: Clock) -> Lifecycle:
        if self._made_by:
            return self._made_by(self.state(), now)
        guard = _guard() if self._guarded else None
        return assemble(self.state(), node=self._config, guard=guard, now=now)

    def _child(self, write: int) -> None:
        status = 1
        skipped = 0.0
        awaited = {signal.SIGTERM, signal.SIGUSR1}
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
            logging.getLogger("podwire.cni").setLevel(logging.ERROR)  # refusals are what is tested
            with netns.entered(self.namespace.fd):
                lifecycle = self._lifecycle(lambda: boot_time() + skipped)
                server = CniServer(self.folder / "run", lifecycle)
                server.start()
                os.write(write, b"+")
                while signal.sigwait(awaited) == signal.SIGUSR1:
                    skipped += float(self._skip.read_text())
                    os.write(write, b"+")
                server.stop()
            status = 0
        except BaseException:
            with contextlib.suppress(OSError):
                os.write(write, traceback.format_exc().encode())
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(status)
