"""The lab's one supervisor: makes the network, forks the processes, watches them.

    the cloud, with --wiring vpc EC2, instance metadata and the VPC's network
    API server and controllers   on this machine's loopback and on the underlay
    one agent per node           in the node's namespaces; started again when it dies
    pod runtime                  all kubelets; started again when it dies

It listens on ``supervisor.sock`` for the command line: one JSON line in, one JSON line out. When it
dies, its children are killed with it, and `podwire lab down` takes the rest away.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import select
import selectors
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn, TypeAlias

from podwire.agent import logs
from podwire.agent.logs import event
from podwire.agent.start import load_agent
from podwire.errors import ConfigError, PodwireError
from podwire.kernel.bpf import Link
from podwire.lab import cgroups, enter, mounts, process, topology
from podwire.lab.cloud import network
from podwire.lab.cloud.main import cloud_main
from podwire.lab.roles import agent_main, api_main, prepare_access, runtime_main
from podwire.lab.state import LabDir, Node, Record, this_process

log = logging.getLogger("podwire.lab.supervisor")

Json: TypeAlias = dict[str, Any]

CNI_PLUGIN = Path(__file__).parents[1] / "built" / "podwire-cni"
RESTART_FIRST_S, RESTART_MOST_S = 0.1, 5.0
STABLE_S = 10.0  # a process that ran that long starts again at once
GRACE_S = 20.0  # for a process that is told to end


@dataclass
class Child:
    """A process that should run. `pid` 0: it does not, at the moment."""

    role: str
    start: Callable[[], int]
    restarts: bool
    pid: int = 0
    pidfd: int = -1
    began: float = 0.0
    delay_s: float = RESTART_FIRST_S
    due: float | None = None  # when to start it again (monotonic)
    deaths: int = 0
    wanted: bool = True


@dataclass
class Supervisor:
    """One lab. `ready_fd` is told ``+`` once everything runs, or what failed, and closed."""

    lab: LabDir
    record: Record
    node_names: list[str]
    ready_fd: int
    children: dict[str, Child] = field(default_factory=dict[str, Child])
    namespaces: dict[str, enter.NodeNamespaces] = field(
        default_factory=dict[str, enter.NodeNamespaces]
    )
    cables: dict[str, Link] = field(default_factory=dict[str, Link])
    """What the underlay's ends run when nodes accelerate Services."""

    def run(self) -> None:
        """Bring the lab up and serve until SIGTERM."""
        logs.setup(str(self.record.settings.get("log_level") or "info"))
        self._selector = selectors.DefaultSelector()
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write)
        signal.signal(signal.SIGTERM, _woken)
        self._private = (wake_read, wake_write, self.ready_fd)
        try:
            self._bring_up()
        except (PodwireError, OSError) as error:
            event(log, logging.ERROR, "lab does not come up", error=error)
            os.write(self.ready_fd, str(error).encode())
            return
        os.write(self.ready_fd, b"+")
        os.close(self.ready_fd)
        self._private = (wake_read, wake_write)
        self._selector.register(wake_read, selectors.EVENT_READ, self._stop)
        self._running = True
        while self._running:
            for key, _ in self._selector.select(self._pause()):
                key.data()
            self._start_due()

    # --- bringing up ------------------------------------------------------------------------------

    def _bring_up(self) -> None:
        lab, record = self.lab, self.record
        for directory in ("netns", "nodes", "bin"):
            (lab.path / directory).mkdir()
        cgroups.join(cgroups.of_lab(lab.name) and cgroups.of_node(lab.name, "control"))
        (lab.path / "bin" / "podwire").symlink_to(CNI_PLUGIN)
        mounts.bind(lab.path, lab.path)
        mounts.share(lab.path)
        record.processes["supervisor"] = this_process()
        lab.write(record)
        self._topology.build(lab, record.dual_stack)
        for index, name in enumerate(self.node_names, 1):
            self._make_node(self._topology.make_node(name, index, record.dual_stack))
        self._listen()
        access = prepare_access(lab, record)
        lab.write(record)  # the children read the nodes there
        load_agent()
        gc.collect()
        gc.freeze()  # what is imported stays shared with the children
        self._child("api", lambda: api_main(record, access), restarts=False)
        for sock in access.sockets:
            sock.close()
        self._child("runtime", lambda: runtime_main(lab, record), restarts=True)
        if record.settings["wiring"] == "vpc":
            self._child("cloud", lambda: cloud_main(lab, record), restarts=False)
        for name in self.node_names:
            self._start_agent(name)
        lab.write(record)

    @property
    def _topology(self) -> ModuleType:
        """What lies between the nodes: an underlay, or a VPC."""
        return network if self.record.settings["wiring"] == "vpc" else topology

    def _make_node(self, node: Node) -> None:
        for directory in ("run", "state", "cni/net.d"):
            (self.lab.node(node.name) / directory).mkdir(parents=True, exist_ok=True)
        self._topology.add_node(self.lab, node, self.record.dual_stack)
        if self.record.settings["agent"].get("lb_acceleration", "disabled") != "disabled":
            self.cables[node.name] = topology.serve_xdp(self.lab, node)
        self.namespaces[node.name] = enter.make_node_namespaces(self.lab, node.name)
        self.record.nodes[node.name] = node

    def _start_agent(self, name: str) -> None:
        namespaces = self.namespaces[name]
        cgroup = cgroups.of_node(self.lab.name, name)

        def main() -> None:
            cgroups.join(cgroup)
            namespaces.enter()
            agent_main(self.lab, self.record, name)

        self._child(f"agent-{name}", main, restarts=True)

    def _child(self, role: str, main: Callable[[], None], *, restarts: bool) -> None:
        def start() -> int:
            return process.fork(role, self.lab.log(role), main, self._descriptors())

        self.children[role] = child = Child(role, start, restarts)
        self._start(child)

    def _descriptors(self) -> tuple[int, ...]:
        """What belongs to this process alone."""
        sockets = (self._listener.fileno(),) if hasattr(self, "_listener") else ()
        pidfds = tuple(c.pidfd for c in self.children.values() if c.pidfd >= 0)
        return (*self._private, *sockets, *pidfds, self._selector.fileno())

    # --- watching ---------------------------------------------------------------------------------

    def _start(self, child: Child) -> None:
        child.pid = child.start()
        child.pidfd = os.pidfd_open(child.pid)
        child.began, child.due = time.monotonic(), None
        self._selector.register(child.pidfd, selectors.EVENT_READ, lambda: self._died(child))
        self.record.processes[child.role] = this_process(child.pid)

    def _died(self, child: Child) -> None:
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        _, status = os.waitpid(child.pid, 0)
        child.pid, child.pidfd = 0, -1
        self.record.processes.pop(child.role, None)
        self.lab.write(self.record)
        if not child.wanted:
            return
        child.deaths += 1
        if time.monotonic() - child.began > STABLE_S:
            child.delay_s = RESTART_FIRST_S
        event(log, logging.WARNING, "process ended", role=child.role,
              status=os.waitstatus_to_exitcode(status), restarts=child.restarts)  # fmt: skip
        if child.restarts:
            child.due = time.monotonic() + child.delay_s
            child.delay_s = min(child.delay_s * 2, RESTART_MOST_S)

    def _pause(self) -> float | None:
        due = [c.due for c in self.children.values() if c.due is not None]
        return max(min(due) - time.monotonic(), 0) if due else None

    def _start_due(self) -> None:
        now = time.monotonic()
        for child in self.children.values():
            if child.due is not None and child.due <= now and child.wanted:
                self._start(child)
                self.lab.write(self.record)

    def _stop(self) -> None:
        os.read(self._private[0], 64)
        self._running = False

    # --- commands ---------------------------------------------------------------------------------

    def _listen(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self._listener.bind(str(self.lab.supervisor_socket))
        finally:
            os.umask(before)
        self._listener.listen(8)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(5)
            try:
                with connection.makefile("rw") as stream:
                    request = json.loads(stream.readline() or "{}")
                    stream.write(json.dumps(self._answer(request)) + "\n")
            except (OSError, ValueError) as error:
                event(log, logging.WARNING, "bad request", error=error)

    def _answer(self, request: Json) -> Json:
        commands: Mapping[str, Callable[[Json], None]] = {
            "start": self._command_start,
            "stop": self._command_stop,
            "add-node": self._command_add_node,
            "remove-node": self._command_remove_node,
            "readdress-node": self._command_readdress_node,
        }
        command = commands.get(str(request.get("do")))
        try:
            if command is None:
                raise ConfigError(f"no such command: {request.get('do')!r}")
            command(request)
        except (PodwireError, OSError) as error:
            return {"error": str(error)}
        self.lab.write(self.record)
        return {
            "processes": {
                c.role: {"pid": c.pid, "deaths": c.deaths} for c in self.children.values()
            }
        }

    def _command_stop(self, request: Json) -> None:
        """End a process and leave it ended; `signal` as a number, by default SIGTERM.

        One that does not end in time is killed, and where it hung is an error and in its log.
        """
        child = self._named(request)
        child.wanted, child.due = False, None
        if not child.pid:
            return
        signal.pidfd_send_signal(child.pidfd, int(request.get("signal") or signal.SIGTERM))
        ended = _ends(child, GRACE_S)
        if not ended:
            signal.pidfd_send_signal(child.pidfd, signal.SIGUSR1)
            _ends(child, 0.5)
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        self._died(child)
        if not ended:
            raise PodwireError(
                f"{child.role} did not end within {GRACE_S:.0f} s and was killed;"
                f" what it was doing is in {self.lab.log(child.role)}"
            )

    def _command_start(self, request: Json) -> None:
        """Start a process; `settings` of the lab (another data path) hold from now on."""
        child = self._named(request)
        self.record.settings |= request.get("settings") or {}
        child.wanted = True
        if not child.pid:
            self._start(child)

    def _named(self, request: Json) -> Child:
        child = self.children.get(str(request.get("process")))
        if child is None:
            raise ConfigError(f"no process {request.get('process')}: {', '.join(self.children)}")
        return child

    def _command_add_node(self, request: Json) -> None:
        name = str(request["node"])
        if name in self.record.nodes:
            raise ConfigError(f"there is a node {name} already")
        taken = {node.index for node in self.record.nodes.values()}
        index = next(i for i in range(1, topology.MOST_NODES + 2) if i not in taken)
        self._make_node(self._topology.make_node(name, index, self.record.dual_stack))
        self._nodes_changed()
        self._start_agent(name)

    def _command_remove_node(self, request: Json) -> None:
        node = self._node(request)
        self._command_stop({"process": f"agent-{node.name}", "signal": signal.SIGKILL})
        del self.children[f"agent-{node.name}"]
        del self.record.nodes[node.name]
        self._nodes_changed()
        self._topology.remove_node(self.lab, node)
        if node.name in self.cables:
            self.cables.pop(node.name).close()
        self.namespaces.pop(node.name).close()

    def _command_readdress_node(self, request: Json) -> None:
        old = self._node(request)
        dual_stack = self.record.dual_stack
        new = self._topology.make_node(old.name, old.index, dual_stack, int(request["host"]))
        self._topology.readdress_node(self.lab, old, new, dual_stack)
        self.record.nodes[new.name] = new
        self._nodes_changed()

    def _node(self, request: Json) -> Node:
        node = self.record.nodes.get(str(request.get("node")))
        if node is None:
            raise ConfigError(f"no node {request.get('node')}: {', '.join(self.record.nodes)}")
        return node

    def _nodes_changed(self) -> None:
        """Runtime and cloud read the nodes from lab.json, when they are told to."""
        self.lab.write(self.record)
        for role in ("runtime", "cloud"):
            child = self.children.get(role)
            if child and child.pid:
                signal.pidfd_send_signal(child.pidfd, signal.SIGHUP)


def _ends(child: Child, seconds: float) -> bool:
    """Whether it ends within so many seconds; waits for it."""
    return bool(select.select([child.pidfd], [], [], seconds)[0])


def _woken(_number: int, _frame: FrameType | None) -> None:
    """The wakeup descriptor has told the loop."""


def supervise(lab: LabDir, record: Record, node_names: list[str], ready_fd: int) -> NoReturn:
    """Be the supervisor of a lab to its end."""
    try:
        (lab.path / "log").mkdir()  # not when `down` was quicker
        process.redirect(lab.log("supervisor"))
        Supervisor(lab, record, node_names, ready_fd).run()
    except BaseException as error:
        event(log, logging.ERROR, "supervisor failed", error=repr(error))
    finally:
        os._exit(0)
