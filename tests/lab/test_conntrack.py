"""The connection table of a lab's nodes: who talks to whom, stale flows, and a table that fills."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from podwire.cli import main
from podwire.conntrack import facts
from podwire.kernel import netns, sysctl
from podwire.kernel.ctnetlink import Status, Table
from podwire.lab import manifests
from podwire.lab.cluster import Lab, ask_unix
from podwire.lab.connect import Ask, ask, ask_all
from tests.lab.conftest import wait_for

PODS = """
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Pod, metadata: {name: a},
   spec: {nodeName: node1, containers: [{name: c}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: b},
   spec: {nodeName: node1, containers: [{name: c}]}}
- apiVersion: v1
  kind: Pod
  metadata: {name: here, labels: {app: echo}}
  spec: &echo
    nodeName: node1
    containers: [{name: c, ports: [{containerPort: 80}, {containerPort: 53, protocol: UDP}]}]
- apiVersion: v1
  kind: Pod
  metadata: {name: there, labels: {app: echo}}
  spec: {<<: *echo, nodeName: node2}
- apiVersion: v1
  kind: Service
  metadata: {name: echo}
  spec:
    type: NodePort
    selector: {app: echo}
    ports:
    - {name: http, port: 80}
    - {name: dns, port: 53, protocol: UDP}
"""


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab()
    lab.apply(manifests.parse(PODS, "pods"))
    lab.wait()
    return lab


@contextmanager
def spaces(lab: Lab, *targets: str) -> Iterator[dict[str, int]]:
    """Descriptors of the targets' namespaces."""
    with ExitStack() as stack:
        found = {target: lab.netns_fd(target) for target in targets}
        for fd in found.values():
            stack.callback(os.close, fd)
        yield found


def conntrack(lab: Lab, what: str, **query: str) -> Any:
    """What node1's agent answers."""
    text = "&".join(f"{name}={value}" for name, value in query.items())
    return lab.agent("node1", f"/v1/conntrack/{what}?{text}")


def listing(lab: Lab, node: str = "node1") -> list[dict[str, Any]]:
    command = ["conntrack", "ls", "--limit", "0", "--json", "--lab", lab.name, "--node", node]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit:
        main.main(command)
    assert exit.value.code == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


def short(name: str | None) -> str:
    return (name or "-").removeprefix("default/")


def test_every_entry_is_attributed_to_who_made_it(lab: Lab) -> None:
    service = lab.api("GET", "/api/v1/namespaces/default/services/echo")["spec"]
    node_port = next(p["nodePort"] for p in service["ports"] if p["name"] == "http")
    address = {name: lab.pod(name)["status"]["podIP"] for name in ("here", "there")}
    node1 = lab.agent("node1", "/v1/status")
    assert node1["healthy"]
    nodes = {n["metadata"]["name"]: n for n in lab.items("/api/v1/nodes")}
    node_ip = nodes["node1"]["status"]["addresses"][0]["address"]
    with spaces(lab, "a", "b", "there", "node/node1", "outside") as fd:
        plan = [
            *[("a", service["clusterIP"], 80, "TCP", "echo")] * 7,
            *[("b", service["clusterIP"], 53, "UDP", "echo")] * 5,
            *[("a", address["there"], 80, "TCP", "-")] * 4,
            *[("b", address["here"], 53, "UDP", "-")] * 3,
            *[("there", address["here"], 80, "TCP", "-")] * 2,
            *[("node/node1", address["there"], 80, "TCP", "-")] * 2,
            *[("outside", node_ip, node_port, "TCP", "echo")] * 6,
        ]
        answers = ask_all(
            Ask(fd[client], target, port, protocol, label=(client, protocol, through))
            for client, target, port, protocol, through in plan
        )
    assert all(answer.outcome == "ok" for answer in answers)
    expected = Counter(
        (answer.ask.label[0].removeprefix("node/"), answer.seen["pod"], *answer.ask.label[1:])
        for answer in answers
    )
    seen = Counter(
        (
            "outside" if row["kind"] == "outside" else short(row["original"]["source_name"]),
            short(row["reply"]["source_name"]),
            row["protocol"],
            short(row["service"]),
        )
        for row in listing(lab)
        if row["reply"]["source_port"] in (80, 53)
    )
    assert seen == expected
    groups = conntrack(lab, "top")["groups"]
    by_pod = {short(row["name"]): row for row in groups["pod"]}
    assert (by_pod["a"]["opened"], by_pod["a"]["services"]) == (11, 7)
    assert {short(r["name"]): r["entries"] for r in groups["service"]} == {"echo": 18}
    kinds = {row["name"]: row["entries"] for row in groups["kind"]}
    assert (kinds["service"], kinds["pod-pod"]) == (12, 9)
    # the agent's own connections to the API, where tracking began in the midst of them, are besides
    assert kinds["outside"] >= 6


def test_a_udp_client_moves_on_when_its_endpoint_goes(lab: Lab) -> None:
    service = lab.api("GET", "/api/v1/namespaces/default/services/echo")["spec"]["clusterIP"]
    with spaces(lab, "a", "b") as fd, ExitStack() as stack:
        clients: dict[str, socket.socket] = {}
        while set(clients) != {"here", "there"}:  # one client served by each
            client = stack.enter_context(netns.socket(fd["a"], socket.AF_INET, socket.SOCK_DGRAM))
            client.connect((service, 53))
            clients.setdefault(served_by(client), client)
        direct = stack.enter_context(netns.socket(fd["b"], socket.AF_INET, socket.SOCK_DGRAM))
        direct.connect((lab.pod("there")["status"]["podIP"], 53))
        assert served_by(direct) == "there"
        lab.api("DELETE", "/api/v1/namespaces/default/pods/there")
        deadline = time.monotonic() + 15
        while served_by(clients["there"], 0.3) != "here":
            assert time.monotonic() < deadline, "the client stays with the pod that is gone"
        assert served_by(clients["here"]) == "here"
        rows = [row for row in listing(lab) if row["protocol"] == "UDP"]
        ports = {row["original"]["source_port"]: row for row in rows}
        # the flow that no Service translated is none of ours
        assert direct.getsockname()[1] in ports
        assert "DST_NAT" not in ports[direct.getsockname()[1]]["status"]
    assert lab.agent("node1", "/v1/status")["parts"]["services"]["kernel"]["stale flows deleted"]


def served_by(client: socket.socket, wait_s: float = 5) -> str:
    """The pod that answers, or "" if none does."""
    client.settimeout(wait_s)
    try:
        client.send(b"who")
        return json.loads(client.recv(4096))["pod"]
    except OSError:
        return ""


# --- a table that fills ---------------------------------------------------------------------------

LIMIT = "net.netfilter.nf_conntrack_max"


@contextmanager
def lowered_limit(least: int) -> Generator[int]:
    """nf_conntrack_max lowered for all namespaces of the machine; the value. Skips where it may
    not be, or where so much is in use that a flood would be none.
    """
    refusal = facts.settings().refusal
    if refusal:
        pytest.skip(refusal)
    with open("/run/pwt-conntrack-max.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        in_use = facts.slab().objects
        if in_use is None:
            pytest.skip("/proc/slabinfo does not tell how many entries are in use everywhere")
        limit, before = max(least, 2 * in_use), int(sysctl.read(LIMIT))
        if limit > min(20_000, before):
            pytest.skip(f"{in_use} entries are in use on this machine")
        try:
            sysctl.write({LIMIT: limit})
            yield limit
        finally:
            sysctl.write({LIMIT: before})


class Flood:
    """UDP flows from pod a to a socket in pod `there`, each from a source port of its own."""

    def __init__(self, stack: ExitStack, source: int, target: int, address: str) -> None:
        self._raw = stack.enter_context(
            netns.socket(source, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
        )
        self._server = stack.enter_context(netns.socket(target, socket.AF_INET, socket.SOCK_DGRAM))
        self._server.bind((address, 9999))
        self._server.setblocking(False)
        self._address = address
        self.sent = 0

    def send(self, first: int, last: int) -> None:
        """A question and an answer for each port number."""
        for port in range(first, last):
            self._raw.sendto(struct.pack(">HHHH", port, 9999, 8, 0), (self._address, 0))
            if port % 64 == 0:
                self._answer()
        self._answer()
        self.sent = max(self.sent, last - 1000)

    def _answer(self) -> None:
        try:
            while True:
                _, peer = self._server.recvfrom(16)
                self._server.sendto(b"", peer)
        except BlockingIOError:
            return


def test_a_table_driven_to_full(lab: Lab) -> None:
    with spaces(lab, "a", "b", "there", "node/node1") as fd, ExitStack() as stack:
        limit = stack.enter_context(lowered_limit(6000))
        table = stack.enter_context(Table(fd["node/node1"]))
        address = lab.pod("there")["status"]["podIP"]
        flood = Flood(stack, fd["a"], fd["there"], address)
        assert not alert_fires(fd["node/node1"])
        foretold = grow(lab, flood, limit)
        assert foretold
        assert alert_fires(fd["node/node1"])  # now: a full table would drop the question itself
        go_on(flood, limit)
        fill(table, flood, limit)
        assert table.usage().used >= limit
        reached = time.monotonic()
        for at, left in foretold:
            assert 0.5 * left < reached - at < 2 * left + 1, (at, left, reached)
        assert conntrack(lab, "status")["pressure"]
        wait_for(lambda: any("% full" in r for r in lab.agent("node1", "/v1/status")["reasons"]))
        wait_for(lambda: node_condition(lab)["status"] == "True")
        make_assured(table, flood)
        before = table.statistics()["drop"]
        with netns.socket(fd["b"], socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect((address, 53))
            assert served_by(client, 0.5) == "", "a packet got through a full table"
            assert conntrack(lab, "status")["counters"]["drop"] > before
            # The kernel says it a few times in five seconds, whichever namespace it is about. None:
            # the log may not be read.
            wait_for(lambda: not served_by(client, 0.1) and full_messages(lab) != 0)
        status = conntrack(lab, "status")
        agrees_with_the_tools(lab, fd["node/node1"])
        advice = conntrack(lab, "advise")
        assert advice["limit"] >= 2 * status["peak"] > limit
        assert "first one" in advice["refusal"]
        with pytest.raises(Exception, match="first one"):
            ask_unix(lab.dir.run_dir("node1") / "agent.sock", "/v1/conntrack/advise?apply=1")
        gone = conntrack(lab, "flush", pod="a", yes="1")
        assert gone["entries"] > limit * 0.9
        assert table.usage().used < limit / 2
    wait_for(lambda: node_condition(lab)["status"] == "False")


PACE = 5  # seconds for the whole table


def grow(lab: Lab, flood: Flood, limit: int) -> list[tuple[float, float]]:
    """A steady flood up to 90 %; a moment and the time to full that was foretold then."""
    began = time.monotonic()
    foretold: list[tuple[float, float]] = []
    while flood.sent < 0.9 * limit:
        due = int((time.monotonic() - began) * limit / PACE)
        flood.send(1000 + flood.sent, 1000 + min(due, int(0.9 * limit) + 1))
        answer = conntrack(lab, "status")
        if flood.sent > 0.6 * limit and not foretold:
            assert answer["full_in_s"] is not None
            now = time.monotonic()  # a busy machine floods more slowly than it was told to
            assert answer["growth_per_s"] > 0.5 * flood.sent / (now - began)
            foretold.append((now, answer["full_in_s"]))
        time.sleep(0.1)
    return foretold


def go_on(flood: Flood, limit: int) -> None:
    """The rest at the same pace, so that the forecast can be held against what came."""
    began, before = time.monotonic(), flood.sent
    while flood.sent < limit:
        due = before + int((time.monotonic() - began) * limit / PACE)
        flood.send(1000 + flood.sent, 1000 + min(due, limit))
        time.sleep(0.02)


def fill(table: Table, flood: Flood, limit: int) -> None:
    """What garbage collection or other flows took is made up for."""
    while table.usage().used < limit:
        flood.send(1000 + flood.sent, 1000 + flood.sent + 50)


def make_assured(table: Table, flood: Flood) -> None:
    """UDP flows that are still used after two seconds may not be evicted any more."""
    deadline = time.monotonic() + 30
    while evictable(table) > 50:
        assert time.monotonic() < deadline, (evictable(table), table.usage())
        flood.send(1000, 1000 + flood.sent)
        time.sleep(1)


def full_messages(lab: Lab) -> int | None:
    return conntrack(lab, "status")["full_messages"]


def evictable(table: Table) -> int:
    return sum(not entry.status & Status.ASSURED for entry in table.entries())


def agrees_with_the_tools(lab: Lab, fd: int) -> None:
    """Packets go on being dropped, so the tools' figures lie between two of ours."""
    before = conntrack(lab, "status")["counters"]
    printed = netns.run(fd, ["conntrack", "-S"]).stdout
    text = netns.run(fd, ["cat", "/proc/net/stat/nf_conntrack"]).stdout.splitlines()
    after = conntrack(lab, "status")["counters"]
    for name in ("drop", "early_drop", "insert_failed", "invalid"):
        tool = sum(int(n) for n in re.findall(rf"\b{name}=(\d+)", printed))
        column = text[0].split().index(name)
        proc = sum(int(line.split()[column], 16) for line in text[1:])
        assert before[name] <= tool <= proc <= after[name], name
    assert after["drop"] > 0


def alert_fires(fd: int) -> bool:
    """The expression of the alert PodwireConntrackNearlyFull, on what Prometheus would scrape."""
    answer = ask(fd, "127.0.0.1", 10249, path="/metrics", timeout_s=10)
    assert answer.outcome == "ok"
    metrics = answer.body.decode()
    values = dict(re.findall(r"^(node_nf_conntrack_entries\w*) (\S+)$", metrics, re.MULTILINE))
    used, limit = (float(values[f"node_nf_conntrack_entries{s}"]) for s in ("", "_limit"))
    return used / limit > 0.8


def node_condition(lab: Lab) -> dict[str, Any]:
    conditions = lab.api("GET", "/api/v1/nodes/node1")["status"]["conditions"]
    return next((c for c in conditions if c["type"] == "ConntrackPressure"), {"status": ""})
