"""Behaviour over time, with real packets: replies, open connections, first packets, restarts."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from podwire.agent import policy_drops
from podwire.agent.cutting import CuttingPart
from podwire.datapath.nftables.policy import PolicyPart
from podwire.datapath.nftables.policy_rules import LOG_GROUP
from podwire.kernel import neighbour, netns
from podwire.kernel.neighbour import Neighbour
from podwire.kernel.nflog import Listener
from podwire.policy import Verdict
from tests.conformance.netpol_fabric import BRIDGE
from tests.kernel.policy_play import Play, wait_for

ISOLATED = {"podSelector": {"matchLabels": {"app": "a"}}, "policyTypes": ["Ingress", "Egress"]}
DENY_IN = {"podSelector": {"matchLabels": {"app": "a"}}}
DENY_OUT = {"podSelector": {"matchLabels": {"app": "a"}}, "policyTypes": ["Egress"]}


@pytest.fixture
def play() -> Iterator[Play]:
    stage = Play()
    stage.start("x/a", 11, {"app": "a"})
    stage.start("x/b", 12, {"app": "b"})
    stage.start("y/c", 13, {"app": "c"}, "n2")
    try:
        yield stage
    finally:
        stage.close()


@pytest.mark.parametrize("client", ["x/b", "y/c"])
def test_replies_pass_an_egress_isolated_server(play: Play, client: str) -> None:
    """flow-01, on the same bridge and across nodes."""
    play.policy("x/out", DENY_OUT)
    play.play()
    with play.listen("x/a", 80) as server, play.socket(client, socket.SOCK_STREAM) as one:
        one.settimeout(5)
        one.connect((play.ip("x/a"), 80))
        accepted, _ = server.accept()
        with accepted:
            sender = threading.Thread(target=accepted.sendall, args=(bytes(1 << 20),))
            sender.start()
            got = 0
            while got < 1 << 20:
                got += len(one.recv(1 << 16))
            sender.join()
    assert not play.connects("x/a", client, 80)


def test_established_connections_are_kept(play: Play) -> None:
    """flow-04: what we document."""
    with play.listen("x/a", 80) as server, play.socket("x/b", socket.SOCK_STREAM) as one:
        one.connect((play.ip("x/a"), 80))
        accepted, _ = server.accept()
        play.policy("x/in", DENY_IN)
        play.play()
        assert not play.connects("x/b", "x/a", 80)
        one.send(b"still there")
        accepted.settimeout(2)
        assert accepted.recv(64) == b"still there"
        accepted.close()


def test_established_connections_can_be_cut(play: Play) -> None:
    play.parts["n1"].close()
    cutting = CuttingPart(
        PolicyPart(play.fabric.nodes["n1"].fd, BRIDGE), play.fabric.nodes["n1"].fd
    )
    cutting.start()
    node = play.socket("node:n1", socket.SOCK_STREAM)
    with play.listen("x/a", 80) as server, play.socket("x/b", socket.SOCK_STREAM) as one, node:
        for client in (one, node):
            client.connect((play.ip("x/a"), 80))
        first, _ = server.accept()
        second, _ = server.accept()
        play.policy("x/in", DENY_IN)
        cutting.apply(play.compilers["n1"].update(play.store.take()))
        cutting.flush()
        assert cutting.status()["connections cut"] == 1
        one.send(b"gone")
        node.send(b"the own node's stays")
        second.settimeout(2)
        assert second.recv(64) == b"the own node's stays"
        first.settimeout(0.2)
        with pytest.raises(TimeoutError):
            first.recv(64)
        first.close()
        second.close()


def test_a_pod_is_isolated_before_its_first_packet(play: Play) -> None:
    """flow-07: whatever it sends as soon as it has a link."""
    play.policy("x/out", {"podSelector": {}, "policyTypes": ["Egress"]})
    play.play()
    with play.socket("y/c", socket.SOCK_DGRAM) as server:
        server.bind((play.ip("y/c"), 53))
        server.setblocking(False)
        for number in range(5):
            name = f"x/new{number}"
            play.start(name, 30 + number, {"app": "new"})
            with play.socket(name, socket.SOCK_DGRAM) as one:
                for _ in range(20):
                    one.sendto(b"out", (play.ip("y/c"), 53))
        with play.socket("node:n2", socket.SOCK_DGRAM) as control:
            control.sendto(b"control", (play.ip("y/c"), 53))
        wait_for(lambda: readable(server))
        assert server.recv(64) == b"control"
        with pytest.raises(BlockingIOError):
            server.recv(64)


def readable(one: socket.socket) -> bool:
    with contextlib.suppress(BlockingIOError):
        return bool(one.recv(64, socket.MSG_PEEK))
    return False


def test_a_restart_opens_nothing_and_breaks_nothing(play: Play) -> None:
    """flow-16: packets all the while, a new process' data path every few milliseconds."""
    rule = {"from": [{"podSelector": {"matchLabels": {"app": "b"}}}]}
    play.policy("x/in", {**DENY_IN, "ingress": [rule]})
    play.play()
    stop = threading.Event()

    def forbidden() -> None:
        while not stop.is_set():
            with play.socket("y/c", socket.SOCK_DGRAM) as one:
                one.sendto(b"forbidden", (play.ip("x/a"), 53))

    with (
        play.listen("x/a", 80) as server,
        play.socket("x/a", socket.SOCK_DGRAM) as receiver,
        play.socket("x/b", socket.SOCK_STREAM) as one,
    ):
        receiver.bind((play.ip("x/a"), 53))
        receiver.setblocking(False)
        one.connect((play.ip("x/a"), 80))
        accepted, _ = server.accept()
        accepted.settimeout(2)
        sender = threading.Thread(target=forbidden)
        sender.start()
        try:
            for _ in range(10):
                part = PolicyPart(play.fabric.nodes["n1"].fd, BRIDGE)
                part.start()
                part.apply(play.tables["n1"])
                part.close()
                one.send(b"on")
                assert accepted.recv(2) == b"on"
        finally:
            stop.set()
            sender.join()
        accepted.close()
        with pytest.raises(BlockingIOError):
            receiver.recv(64)


def echo_request(play: Play, source: str, destination: str, number: int) -> bool:
    """Whether a ping is answered; each number is a connection of its own."""
    fd = play.fabric.place(source).fd
    with netns.socket(fd, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as one:
        one.settimeout(0.3)
        body = struct.pack(">BBHHH", 8, 0, 0, number, 1)
        total = sum(struct.unpack(">4H", body))
        total = (total >> 16) + (total & 0xFFFF)
        body = body[:2] + struct.pack(">H", ~total & 0xFFFF) + body[4:]
        one.sendto(body, (play.ip(destination), 0))
        try:
            while True:
                data = one.recv(256)
                if data[20] == 0:
                    return True
        except TimeoutError:
            return False


def test_echo_is_judged_and_errors_pass(play: Play) -> None:
    assert echo_request(play, "x/b", "x/a", 1)
    rule = {"to": [{"podSelector": {}}], "ports": [{"protocol": "UDP", "port": 53}]}
    play.policy("x/in", ISOLATED | {"egress": [rule]})
    play.play()
    assert not echo_request(play, "x/b", "x/a", 2)
    assert not echo_request(play, "x/a", "x/b", 3)
    with play.socket("x/a", socket.SOCK_DGRAM) as one:  # nobody listens: port unreachable
        one.settimeout(2)
        one.connect((play.ip("x/b"), 53))
        one.send(b"?")
        with pytest.raises(ConnectionRefusedError):
            one.recv(64)


def test_neighbour_discovery_always_passes(play: Play) -> None:
    rule = {"ports": [{"port": 80}]}
    play.policy("x/in", ISOLATED | {"ingress": [rule], "egress": [rule]})
    play.play()
    pods = [play.fabric.pods[name] for name in ("x/a", "x/b")]
    for one, other in (pods, pods[::-1]):
        entry = Neighbour(one.index("eth0"), other.addresses[1], other.mac)
        one.sock.run(neighbour.delete(entry))
    with play.listen("x/a", 80, 128):
        assert play.connects("x/b", "x/a", 80, 128)
    assert not play.connects("x/b", "x/a", 81, 128)


def frame(play: Play, source: str, mac: bytes, address: str) -> None:
    """A UDP packet to `address` in a frame to `mac`, by hand."""
    place = play.fabric.pods[source]
    packed = socket.inet_aton(address)
    udp = struct.pack(">HHHH", 7777, 53, 11, 0) + b"hey"
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0,
                       place.addresses[0], packed)  # fmt: skip
    total = sum(struct.unpack(">10H", head))
    total = (total >> 16) + (total & 0xFFFF)
    head = head[:10] + struct.pack(">H", ~total & 0xFFFF) + head[12:]
    with netns.socket(place.fd, socket.AF_PACKET, socket.SOCK_RAW) as one:
        one.bind(("eth0", 0x0800))
        one.send(mac + place.mac + b"\x08\x00" + head + udp)


def heard(play: Play, name: str, send: object) -> int:
    """How many of our UDP packets reach the pod's link."""
    sniffer = netns.socket(
        play.fabric.pods[name].fd, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)
    )
    with sniffer:
        sniffer.bind(("eth0", 0x0800))
        send()  # type: ignore[operator]
        time.sleep(0.05)
        sniffer.setblocking(False)
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                count += sniffer.recv(256).endswith(b"hey")
        return count


def test_a_port_takes_only_what_is_addressed_to_its_pod(play: Play) -> None:
    """Egress policies hold also where a second pod lends its ears; no multicast gets in."""
    play.start("x/d", 14, {"app": "d"})
    a, d = (play.fabric.pods[name].mac for name in ("x/a", "x/d"))
    multicast = b"\x01\x00\x5e\x00\x00\xfb"
    assert heard(play, "x/d", lambda: frame(play, "x/b", d, play.ip("x/d"))) == 1
    assert heard(play, "x/d", lambda: frame(play, "x/b", d, "8.8.8.8")) == 0
    assert heard(play, "x/a", lambda: frame(play, "x/b", multicast, "224.0.0.251")) == 1
    play.policy("x/in", DENY_IN)
    play.play()
    assert heard(play, "x/a", lambda: frame(play, "x/b", multicast, "224.0.0.251")) == 0
    assert heard(play, "x/d", lambda: frame(play, "x/b", multicast, "224.0.0.251")) == 1
    assert heard(play, "x/a", lambda: frame(play, "x/b", a, play.ip("x/a"))) == 0


def test_drops_are_logged_and_counted_by_policy(play: Play) -> None:
    play.policy("x/in", DENY_IN)
    play.policy("y/watch", {"podSelector": {}}, annotations={"podwire.dev/audit": "true"})
    play.play()
    listeners = [Listener(LOG_GROUP, play.fabric.nodes[node].fd) for node in ("n1", "n2")]
    try:
        assert not play.connects("y/c", "x/a", 80)
        assert play.connects("x/b", "y/c", 80)  # audited: refused, not dropped
        found = []
        for listener, node in zip(listeners, ("n1", "n2"), strict=True):
            wait_for(lambda listener=listener: readable_listener(listener, found))
            found[-1] = policy_drops.logged(play.tables[node], found[-1], 0)
    finally:
        for listener in listeners:
            listener.close()
    denied, audited = found
    assert (denied["source_name"], denied["destination_name"]) == ("y/c", "x/a")
    assert (denied["verdict"], denied["port"]) == ("deny", 80)
    assert denied["policies"] == ["NetworkPolicy x/in"]
    assert (audited["verdict"], audited["policies"]) == ("audit", ["NetworkPolicy y/watch"])
    counts = {
        (count.verdict, str(count.policies[0])): count.packets
        for node in ("n1", "n2")
        for count in play.parts[node].counts()
        if count.policies
    }
    assert counts[Verdict.DENY, "NetworkPolicy x/in"] >= 1
    assert counts[Verdict.AUDIT, "NetworkPolicy y/watch"] >= 1


def readable_listener(listener: Listener, found: list[object]) -> bool:
    packets = listener.drain()
    found += packets[:1]
    return bool(packets)


def test_what_somebody_breaks_is_repaired(play: Play) -> None:
    play.policy("x/in", DENY_IN)
    play.play()
    part, fd = play.parts["n1"], play.fabric.nodes["n1"].fd
    assert part.verify() == []
    for command, repair in [
        ("flush map inet podwire-policy ingress4", "restored the set podwire-policy ingress4"),
        ("flush chain inet podwire-policy to-pod", "made the rules of table podwire-policy again"),
        (
            "flush chain bridge podwire-policy forward",
            "made the rules of table podwire-policy again",
        ),
    ]:
        done = netns.run(fd, ["nft", *command.split()])
        assert done.returncode == 0, done.stderr
        assert part.verify() == [repair]
        assert not play.connects("x/b", "x/a", 80)
    assert netns.run(fd, ["nft", "flush", "ruleset"]).returncode == 0
    play.policy("x/more", DENY_IN)
    play.pod("x/d", {"app": "d"}, addresses=("10.244.1.99",))
    play.play()
    assert not play.connects("x/b", "x/a", 80), "the next change finds it out"
    part.cleanup()
    assert play.connects("x/b", "x/a", 80)


def test_the_rules_can_be_listed(play: Play) -> None:
    """nft 1.0.6 aborts on what it does not understand."""
    play.policy("x/in", DENY_IN)
    play.play()
    done = netns.run(play.fabric.nodes["n1"].fd, ["nft", "list", "ruleset"])
    assert done.returncode == 0, done.stderr
    assert isinstance(done, subprocess.CompletedProcess)
    assert "map @exact" in done.stdout
