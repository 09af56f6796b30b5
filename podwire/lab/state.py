"""What a lab leaves on the file system, so that `podwire lab down` can always undo it.

    /run/podwire/lab/<name>/       a mount point of its own, shared with the nodes' mount namespaces
        lab.json                   processes with their start times, nodes, settings
        netns/<…>                  network namespaces: underlay, outside, node-<node>, pod-<uid>
        kubeconfig                 for kubectl on this machine; node.kubeconfig for the agents
        nodes/<node>/              run/ and state/ of the agent, cni/net.d
        log/<process>.log          standard error of every process, the supervisor's too

Everything of a lab is found by its name: mounts below the directory, processes in the cgroup of
that name. `lab.json` helps people and the command line; `down` does not need it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from podwire.errors import ConfigError

ROOT = Path("/run/podwire/lab")
DEFAULT_NAME = "lab"
LONGEST_NAME = 20  # the paths of unix sockets below the directory must fit into 107 bytes


@dataclass(frozen=True)
class Process:
    """A process, told apart from a later one with the same id by its start time (clock ticks)."""

    pid: int
    start: int

    @property
    def alive(self) -> bool:
        return _start_time(self.pid) == self.start


def _start_time(pid: int) -> int:
    """Field 22 of /proc/<pid>/stat; 0 when the process is gone or a zombie (proc(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in ("Z", "X") else int(fields[19])


def this_process(pid: int = 0) -> Process:
    """The identity of a living process, by default this one."""
    pid = pid or os.getpid()
    return Process(pid, _start_time(pid))


@dataclass(frozen=True)
class Node:
    """One node of a lab. Addresses and CIDRs: IPv4 first, then IPv6 if the lab has both."""

    name: str
    index: int
    addresses: tuple[str, ...]
    pod_cidrs: tuple[str, ...]


@dataclass
class Record:
    """The content of `lab.json`."""

    name: str
    dual_stack: bool = False
    settings: dict[str, Any] = field(default_factory=dict[str, Any])  # wiring, routing, datapath
    api: dict[str, Any] = field(default_factory=dict[str, Any])  # address, port
    nodes: dict[str, Node] = field(default_factory=dict[str, Node])
    processes: dict[str, Process] = field(default_factory=dict[str, Process])  # by role


class LabDir:
    """The paths of one lab. Raises ConfigError for a name that cannot be one."""

    def __init__(self, name: str) -> None:
        plain = name.replace("-", "").isalnum() and name.isascii() and name == name.lower()
        if not plain or len(name) > LONGEST_NAME or name.startswith("-"):
            raise ConfigError(
                f"--name {name!r}: lower-case letters, digits and '-', at most {LONGEST_NAME}"
            )
        self.name = name
        self.path = ROOT / name

    @property
    def exists(self) -> bool:
        return self.path.is_dir()

    @property
    def kubeconfig(self) -> Path:
        return self.path / "kubeconfig"

    def netns(self, what: str) -> Path:
        """``underlay``, ``outside``, ``node-<name>`` or ``pod-<uid>``."""
        return self.path / "netns" / what

    def node(self, name: str) -> Path:
        return self.path / "nodes" / name

    def run_dir(self, node: str) -> Path:
        return self.node(node) / "run"

    def log(self, process: str) -> Path:
        return self.path / "log" / f"{process}.log"

    def last_words(self, lines: int = 40) -> dict[str, str]:
        """The end of every process's log that says something, by the process."""
        logs = sorted((self.path / "log").glob("*.log"))
        texts = {path.stem: path.read_text(errors="replace").splitlines() for path in logs}
        return {name: "\n".join(text[-lines:]) for name, text in texts.items() if text}

    @property
    def supervisor_socket(self) -> Path:
        return self.path / "supervisor.sock"

    @property
    def runtime_socket(self) -> Path:
        return self.path / "runtime.sock"

    def write(self, record: Record) -> None:
        """Replace lab.json at once."""
        temporary = self.path / ".lab.json"
        temporary.write_text(json.dumps(asdict(record), indent=1) + "\n")
        temporary.rename(self.path / "lab.json")

    def read(self) -> Record:
        """Raises ConfigError when there is no such lab, or only half of one."""
        try:
            found = json.loads((self.path / "lab.json").read_text())
        except FileNotFoundError:
            if self.exists:
                raise ConfigError(
                    f"lab {self.name} is not whole: `podwire lab down --name {self.name}` "
                    "takes the rest away"
                ) from None
            raise ConfigError(
                f"no lab {self.name}: `podwire lab up` makes one, `podwire lab ls` lists them"
            ) from None
        return Record(
            found["name"],
            found["dual_stack"],
            found["settings"],
            found["api"],
            {
                name: Node(name, n["index"], tuple(n["addresses"]), tuple(n["pod_cidrs"]))
                for name, n in found["nodes"].items()
            },
            {role: Process(**process) for role, process in found["processes"].items()},
        )


def names() -> list[str]:
    """The labs on this machine, whole or not."""
    return sorted(path.name for path in ROOT.iterdir() if path.is_dir()) if ROOT.is_dir() else []
