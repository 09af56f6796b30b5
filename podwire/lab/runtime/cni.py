"""Executes CNI plugins as a container runtime does: configuration lists, prevResult, capabilities.

Blocking: the caller runs it in a thread that is in the node's network namespace. Results are kept
for DEL in memory: a runtime that was started again gets them by the ADD that it repeats.

Source: containernetworking/cni SPEC.md 1.1.0, sections 2 to 4.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from podwire.errors import PodwireError

Json: TypeAlias = dict[str, Any]

TIMEOUT_S = 60.0
TRY_AGAIN_LATER = 11


class CniError(PodwireError):
    """A plugin's error result; `code` as in section 5 of the specification (999: not even JSON)."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class NetworkList:
    """A network configuration list as it stands in ``<conf-dir>/*.conflist``."""

    name: str
    cni_version: str
    plugins: Sequence[Json]


@dataclass(frozen=True)
class Sandbox:
    """What a plugin is told of one pod."""

    container_id: str
    netns: str
    namespace: str
    pod: str
    uid: str
    capabilities: Mapping[str, object]  # runtimeConfig, by capability
    interface: str = "eth0"

    @property
    def arguments(self) -> str:
        return (
            f"IgnoreUnknown=1;K8S_POD_NAMESPACE={self.namespace};K8S_POD_NAME={self.pod};"
            f"K8S_POD_INFRA_CONTAINER_ID={self.container_id};K8S_POD_UID={self.uid}"
        )


def load(conf_dir: Path) -> NetworkList | None:
    """The first configuration list by name, as containerd picks it; None when there is none."""
    for path in sorted(conf_dir.glob("*.conflist")):
        try:
            document = json.loads(path.read_text())
            return NetworkList(document["name"], document["cniVersion"], document["plugins"])
        except (OSError, ValueError, KeyError):
            continue  # half-written by another program: it will be looked at again
    return None


class Plugins:
    """Runs the plugins of one node."""

    def __init__(self, bin_dirs: Sequence[Path], socket: Path) -> None:
        self._bin_dirs = bin_dirs
        self._results: dict[str, Json] = {}  # by container id
        self._environment = {
            "CNI_PATH": ":".join(map(str, bin_dirs)),
            "PODWIRE_CNI_SOCKET": str(socket),
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        }

    def add(self, network: NetworkList, sandbox: Sandbox) -> Json:
        """The result of the last plugin. After an error everything is taken away again."""
        result: Json | None = None
        try:
            for plugin in network.plugins:
                result = self._run("ADD", network, plugin, sandbox, result)
        except PodwireError:
            with contextlib.suppress(PodwireError):
                self.delete(network, sandbox)
            raise
        assert result is not None
        self._results[sandbox.container_id] = result
        return result

    def delete(self, network: NetworkList, sandbox: Sandbox) -> None:
        """DEL of every plugin, last first. Raises CniError."""
        result = self._results.get(sandbox.container_id)
        for plugin in reversed(network.plugins):
            self._run("DEL", network, plugin, sandbox, result)
        self._results.pop(sandbox.container_id, None)

    def status(self, network: NetworkList) -> None:
        """STATUS of every plugin (since 1.1.0). Raises CniError when one is not ready."""
        if network.cni_version.startswith(("0.", "1.0.")):
            return
        for plugin in network.plugins:
            self._run("STATUS", network, plugin, None, None)

    def _run(
        self,
        command: str,
        network: NetworkList,
        plugin: Json,
        sandbox: Sandbox | None,
        previous: Json | None,
    ) -> Json:
        configuration = {**plugin, "name": network.name, "cniVersion": network.cni_version}
        environment = {**self._environment, "CNI_COMMAND": command}
        if sandbox is not None:
            wanted = cast("Mapping[str, bool]", configuration.pop("capabilities", {}))
            given = {k: v for k, v in sandbox.capabilities.items() if wanted.get(k)}
            if given:
                configuration["runtimeConfig"] = given
            environment |= {
                "CNI_CONTAINERID": sandbox.container_id,
                "CNI_NETNS": sandbox.netns,
                "CNI_IFNAME": sandbox.interface,
                "CNI_ARGS": sandbox.arguments,
            }
        if previous is not None:
            configuration["prevResult"] = previous
        program = self._find(str(plugin["type"]))
        status, output = execute(program, environment, json.dumps(configuration).encode())
        return _outcome(str(plugin["type"]), command, status, output)

    def _find(self, kind: str) -> Path:
        for folder in self._bin_dirs:
            if (folder / kind).exists():
                return folder / kind
        raise CniError(f"no CNI plugin {kind} in {self._environment['CNI_PATH']}", 999)


def _outcome(kind: str, command: str, status: int, output: bytes) -> Json:
    try:
        answer: Json = json.loads(output) if output.strip() else {}
    except ValueError:
        answer = {"code": 999, "msg": output.decode("utf-8", "replace")[:200]}
    if status != 0:
        details = f": {answer['details']}" if answer.get("details") else ""
        message = f"{kind} {command}: {answer.get('msg', f'exit status {status}')}{details}"
        raise CniError(message, int(answer.get("code", 999)))
    return answer


def execute(
    program: Path, environment: Mapping[str, str], stdin: bytes, timeout_s: float = TIMEOUT_S
) -> tuple[int, bytes]:
    """Exit status and standard output of a program, in the calling thread's namespaces.

    posix_spawn (a vfork inside) instead of subprocess: a fork of a large process costs more than
    the plugin. Raises CniError when it takes too long.
    """
    input_read, input_write = os.pipe2(os.O_CLOEXEC)
    output_read, output_write = os.pipe2(os.O_CLOEXEC)
    try:
        child = os.posix_spawn(
            program,
            [program.name],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, input_read, 0),
                (os.POSIX_SPAWN_DUP2, output_write, 1),
            ],
        )
    except OSError as error:
        os.close(input_write)
        os.close(output_read)
        raise CniError(f"cannot run {program}: {os.strerror(error.errno or 0)}", 999) from None
    finally:
        os.close(input_read)
        os.close(output_write)
    try:
        with contextlib.suppress(BrokenPipeError):
            os.write(input_write, stdin)  # below the 64 KiB that a pipe takes at once
        os.close(input_write)
        output = _read_all(output_read, time.monotonic() + timeout_s)
    finally:
        os.close(output_read)
    if output is None:
        os.kill(child, signal.SIGKILL)
    _, wait_status = os.waitpid(child, 0)
    if output is None:
        raise CniError(f"{program.name} took longer than {timeout_s:.0f} s", TRY_AGAIN_LATER)
    return os.waitstatus_to_exitcode(wait_status), output


def _read_all(fd: int, deadline: float) -> bytes | None:
    """Everything up to the end of the stream, None when the deadline passes first."""
    pieces: list[bytes] = []
    with selectors.PollSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while selector.select(max(deadline - time.monotonic(), 0)):
            piece = os.read(fd, 65536)
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
    return None
