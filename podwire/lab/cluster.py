"""A lab from the outside: what the command line, the demo and the tests do with one.

lab = Lab.up("demo", nodes=2)
lab.apply(manifests.read(["shop.yaml"]))
lab.wait()
lab.run("web-0", ["curl", "http://api"])
lab.down()
"""

from __future__ import annotations

import http.client
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

from podwire.errors import ApiError, ConfigError, PodwireError
from podwire.kernel import netns
from podwire.lab import control, enter, nursery, teardown
from podwire.lab.access import Access
from podwire.lab.manifests import Manifest
from podwire.lab.readiness import Readiness
from podwire.lab.state import DEFAULT_NAME, LabDir, Process, Record

Json: TypeAlias = dict[str, Any]

UNREADY_TIMEOUT_S = 60.0


class Lab:
    """A lab that is up. Raises ConfigError when there is none of that name."""

    def __init__(self, name: str = DEFAULT_NAME) -> None:
        self.dir = LabDir(name)
        self.record: Record = self.dir.read()
        self._access: Access | None = None

    @property
    def name(self) -> str:
        return self.dir.name

    # --- beginning and end ------------------------------------------------------------------------

    @classmethod
    def up(
        cls,
        name: str = DEFAULT_NAME,
        *,
        nodes: int = 2,
        dual_stack: bool = False,
        wiring: str = "bridge",
        routing: str = "direct",
        datapath: str = "auto",
        agent: Mapping[str, Any] | None = None,
        instance_type: str = "m5.large",
        log_level: str = "info",
    ) -> Lab:
        """Bring up an empty lab; `agent` are further fields of the agent's options.

        Returns when every process runs; `wait` waits for the nodes. Raises ConfigError when a lab
        of that name is there already, PodwireError when it does not come up.
        """
        lab = LabDir(name)
        if os.geteuid() != 0:
            raise ConfigError("a lab needs root: it makes network namespaces")
        if nodes < 1:
            raise ConfigError("--nodes: a lab has at least one node")
        settings = {
            "wiring": wiring,
            "routing": routing,
            "datapath": datapath,
            "agent": dict(agent or {}),
            "instance_type": instance_type,
            "log_level": log_level,
        }
        try:
            lab.path.mkdir(parents=True)
        except FileExistsError:
            raise ConfigError(
                f"lab {name} is there already: `podwire lab down --name {name}` takes it away"
            ) from None
        record = Record(name, dual_stack, settings)
        try:
            nursery.start(lab, record, [f"node{i}" for i in range(1, nodes + 1)])
        except PodwireError:
            teardown.down(lab)
            raise
        return cls(name)

    def down(self) -> None:
        """Take everything away."""
        teardown.down(self.dir)

    def reload(self) -> None:
        """Read lab.json again."""
        self.record = self.dir.read()

    def control(self, do: str, **request: Any) -> Json:
        """Give the supervisor a command (`podwire.lab.supervisor`)."""
        answer = control.command(self.dir, {"do": do, **request})
        self.reload()
        return answer

    def process(self, role: str) -> Process:
        """``supervisor``, ``api``, ``runtime`` or ``agent-<node>``. Raises ConfigError."""
        self.reload()
        found = self.record.processes.get(role)
        if found is None or not found.alive:
            raise ConfigError(f"lab {self.name}: {role} does not run")
        return found

    # --- the API ----------------------------------------------------------------------------------

    def api(self, method: str, path: str, body: object = None, content_type: str = "") -> Any:
        """One request to the API server; the decoded answer. Raises ApiError."""
        if self._access is None:
            self._access = Access(self.dir.kubeconfig)
        return self._access.request(method, path, body, content_type)

    def items(self, path: str) -> list[Json]:
        """The objects of a list, e.g. ``/api/v1/pods``."""
        return self.api("GET", path)["items"]

    def apply(self, manifests: Iterable[Manifest], namespace: str = "") -> list[Json]:
        """Apply all; one result each (`podwire.lab.api.manifests`)."""
        return self.api("POST", "/podwire/apply", _objects(manifests, namespace))

    def delete(self, manifests: Iterable[Manifest], namespace: str = "") -> list[Json]:
        """Delete all; one result each."""
        return self.api("POST", "/podwire/delete", _objects(manifests, namespace))

    def pod(self, name: str, namespace: str = "default") -> Json:
        """A pod by its name or the name of what made it (``web`` finds the first of ``web-…``).

        Raises ConfigError when there is none.
        """
        try:
            return self.api("GET", f"/api/v1/namespaces/{namespace}/pods/{name}")
        except ApiError as error:
            if error.status != 404:
                raise
        pods = self.items(f"/api/v1/namespaces/{namespace}/pods")
        for pod in pods:
            if pod["metadata"]["name"].startswith(f"{name}-") and pod["status"].get("podIP"):
                return pod
        raise ConfigError(
            f"no pod {name} in namespace {namespace}; there are: "
            + (", ".join(p["metadata"]["name"] for p in pods) or "none")
        )

    # --- readiness --------------------------------------------------------------------------------

    def wait(
        self,
        timeout_s: float = UNREADY_TIMEOUT_S,
        progress: Callable[[Readiness], None] | None = None,
    ) -> None:
        """Wait until nodes, workloads and pods are ready and the agents have programmed them.

        Raises PodwireError listing what is not.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            began = time.monotonic()
            state = Readiness.of(self)
            if progress is not None:
                progress(state)
            if state.done:
                return
            now = time.monotonic()
            if now > deadline:
                lines = "\n  ".join(state.missing)
                raise PodwireError(f"not ready after {timeout_s:.0f} s:\n  {lines}")
            time.sleep(min(max(3 * (now - began), 0.01), 0.5))

    # --- being somewhere --------------------------------------------------------------------------

    def place(self, target: str, namespace: str = "default") -> enter.Place:
        """Where ``POD``, ``node/NODE`` or ``outside`` is. Raises ConfigError."""
        if target == "outside":
            return enter.Place(self.dir, "outside", self.dir.netns("outside"))
        kind, _, name = target.rpartition("/")
        if kind in ("node", "nodes"):
            if name not in self.record.nodes:
                raise ConfigError(f"no node {name}: {', '.join(self.record.nodes)}")
            agent = self.record.processes.get(f"agent-{name}")
            return enter.Place(
                self.dir,
                name,
                self.dir.netns(f"node-{name}"),
                node=name,
                agent=agent if agent and agent.alive else None,
            )
        pod = self.pod(name, namespace)
        return enter.place_of_pod(self.dir, pod, self._dns_servers())

    def _dns_servers(self) -> Sequence[str]:
        try:
            service = self.api("GET", "/api/v1/namespaces/kube-system/services/kube-dns")
        except ApiError:
            return []
        return service["spec"].get("clusterIPs") or []

    def netns_fd(self, target: str, namespace: str = "default") -> int:
        """A descriptor of the target's network namespace; the caller closes it."""
        return netns.open_path(self.place(target, namespace).netns)

    def run(
        self,
        target: str,
        command: Sequence[str] | str,
        *,
        namespace: str = "default",
        timeout_s: float = 30.0,
        input: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in a pod, on a node or outside, to its end. Text goes through a shell."""
        place = self.place(target, namespace)
        argv = ["sh", "-c", command] if isinstance(command, str) else list(command)
        return subprocess.run(
            argv,
            preexec_fn=place.enter,
            input=input,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def execute(self, target: str, command: Sequence[str], namespace: str = "default") -> None:
        """Become a program in a pod, on a node or outside. Does not return.

        Raises ConfigError when the program is not there.
        """
        self.place(target, namespace).enter()
        sys.stdout.flush()
        try:
            os.execvp(command[0], list(command))
        except OSError as error:
            raise ConfigError(f"cannot run {shlex.join(command)}: {error.strerror}") from None

    # --- the runtime and the agents ---------------------------------------------------------------

    def logs(self, pod: str, namespace: str = "default") -> list[Json]:
        """The requests that the echo server of a pod, or of ``outside``, saw; oldest first."""
        if pod == "outside":
            return ask_unix(self.dir.runtime_socket, "/v1/logs?namespace=&pod=outside")
        name = self.pod(pod, namespace)["metadata"]["name"]
        return ask_unix(self.dir.runtime_socket, f"/v1/logs?namespace={namespace}&pod={name}")

    def runtime_summary(self) -> Json:
        """What the runtime says of itself: pods, running, waiting (one line each), nodes."""
        return ask_unix(self.dir.runtime_socket, "/v1/summary")

    def agent(self, node: str, path: str) -> Any:
        """What the agent on a node answers to ``/v1/…``. Raises ApiError."""
        return ask_unix(self.dir.run_dir(node) / "agent.sock", path)


def _objects(manifests: Iterable[Manifest], namespace: str) -> list[Json]:
    found: list[Json] = []
    for manifest in manifests:
        obj = manifest.obj
        if namespace and not obj["metadata"].get("namespace"):
            obj = {**obj, "metadata": {**obj["metadata"], "namespace": namespace}}
        found.append(obj)
    return found


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def ask_unix(path: Path, target: str) -> Any:
    """GET over a unix socket, decoded. Raises ApiError, also when nobody listens."""
    connection = _UnixConnection(path)
    try:
        connection.request("GET", target)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ApiError(f"nobody answers at {path}: {error}") from None
    finally:
        connection.close()
    answer: object = json.loads(body or b"null")
    if response.status != 200:
        said = cast(Json, answer).get("error") if isinstance(answer, dict) else answer
        raise ApiError(str(said), status=response.status)
    return answer
