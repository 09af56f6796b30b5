"""Rules judged by what they do to real packets, whatever chains and tables are called."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

from podwire.kernel import netns
from tests.conformance.cni_live import Live
from tests.conformance.cni_node import Namespace

TIMEOUT_S = 0.5
HOST4, OUTSIDE4 = "192.0.2.1", "192.0.2.2"
HOST6, OUTSIDE6 = "2001:db8:ffff::1", "2001:db8:ffff::2"
_PROTOCOLS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


def connect_outside(host: Namespace) -> Namespace:
    """A host of the outside world, one hop from the node, that knows no pod addresses."""
    outside = Namespace("outside")
    _pair(host, "out0", outside, "up0")
    for namespace, link, four, six in (
        (host, "out0", HOST4, HOST6),
        (outside, "up0", OUTSIDE4, OUTSIDE6),
    ):
        namespace.run("ip", "address", "add", f"{four}/24", "dev", link)
        namespace.run("ip", "address", "add", f"{six}/64", "dev", link, "nodad")
        namespace.run("ip", "link", "set", link, "up")
        namespace.run("ip", "link", "set", "lo", "up")
    host.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    return outside


def wire_by_hand(host: Namespace, pod: Namespace, ifname: str, result: dict[str, Any]) -> None:
    """Give the pod what an invented prevResult says it has."""
    _pair(host, "byhand0", pod, ifname)
    host.run("ip", "link", "set", "byhand0", "up")
    for link in ("lo", ifname):
        pod.run("ip", "link", "set", link, "up")
    for each in result.get("ips", []):
        address, length = each["address"].split("/")
        gateway = each.get("gateway")
        nodad = ["nodad"] if ":" in address else []
        pod.run("ip", "address", "add", each["address"], "dev", ifname, *nodad)
        if gateway:
            host.run("ip", "address", "add", f"{gateway}/{length}", "dev", "byhand0", *nodad)
            pod.run("ip", "route", "add", "default", "via", gateway)


def _pair(host: Namespace, name: str, peer: Namespace, peer_name: str) -> None:
    for namespace in (host, peer):  # or nobody answers until a second has passed
        namespace.run("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")
    end = f"link add {name} type veth peer name {peer_name} netns {peer.name}"
    host.run("ip", *end.split())


def seen_source(
    server: Namespace, port: int, client: Namespace, to: str, to_port: int, protocol: str = "tcp"
) -> str | None:
    """Which address a server in one namespace sees a client from another come from; None: it
    cannot be reached."""
    family = socket.AF_INET6 if ":" in to else socket.AF_INET
    kind = _PROTOCOLS[protocol]
    with (
        netns.socket(server.fd, family, kind) as listener,
        netns.socket(client.fd, family, kind) as caller,
    ):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))
        listener.settimeout(TIMEOUT_S)
        caller.settimeout(TIMEOUT_S)
        with contextlib.suppress(OSError):
            if protocol == "udp":
                caller.sendto(b"hello", (to, to_port))
                _, peer = listener.recvfrom(64)
                listener.sendto(b"there", peer)
                return peer[0] if caller.recv(64) == b"there" else None
            listener.listen()
            caller.connect((to, to_port))
            connection, peer = listener.accept()
            connection.close()
            return peer[0]
    return None


def host_ports(
    config: dict[str, Any],
    opened: bool,
    host: Namespace,
    pod: Namespace,
    outside: Namespace,
    pod_ips: list[str],
) -> Iterator[str]:
    """Each mapping from outside, from the host's own address, from 127.0.0.1 and from the pod."""
    snat = config.get("snat") is not False
    for mapping in config.get("runtimeConfig", {}).get("portMappings", []):
        host_ip = mapping.get("hostIP", "")
        for pod_ip in pod_ips:
            six = ":" in pod_ip
            if host_ip and (":" in host_ip) != six:
                continue
            own = HOST6 if six else HOST4
            loopback = host_ip.startswith("127.") or host_ip == "::1"
            anywhere = host_ip in ("", "0.0.0.0", "::", own)
            if not anywhere and not loopback:
                own = host_ip
                with contextlib.suppress(RuntimeError):  # the second look finds it there
                    host.run("ip", "address", "add", host_ip, "dev", "out0")
                outside.run("ip", "route", "replace", host_ip, "via", HOST6 if six else HOST4)
            trials = [
                ("outside", outside, own, not loopback),
                ("the host", host, own, not loopback),
                ("the pod itself", pod, own, not loopback and snat),
            ]
            if not six:  # IPv6 has no way out from ::1
                local = snat and host_ip in ("", "0.0.0.0", "127.0.0.1")
                trials.append(("127.0.0.1", host, "127.0.0.1", local))
            for who, client, to, expected in trials:
                yield from _trial(mapping, who, client, pod, to, expected and opened)


def _trial(
    mapping: dict[str, Any],
    who: str,
    client: Namespace,
    pod: Namespace,
    to: str,
    expected: bool,
) -> Iterator[str]:
    protocol = mapping.get("protocol", "tcp").lower()
    if protocol not in _PROTOCOLS:
        return
    port, target = int(mapping["hostPort"]), int(mapping["containerPort"])
    for _ in range(3 if expected else 1):  # a first packet may come late under load
        source = seen_source(pod, target, client, to, port, protocol)
        if source is not None:
            break
    if (source is not None) != expected:
        verb = "answers" if source else "does not answer"
        yield f"host port {port}/{protocol} at {to} {verb} {who}"


def masquerade(
    pod: Namespace, outside: Namespace, pod_ips: list[str], translated: bool
) -> Iterator[str]:
    """What the pod sends out of its network comes from the host's address."""
    for pod_ip in pod_ips:
        six = ":" in pod_ip
        to, own = (OUTSIDE6, HOST6) if six else (OUTSIDE4, HOST4)
        source = seen_source(outside, 9999, pod, to, 9999)
        wanted = own if translated else None  # outside has no route back to pods
        if source != wanted:
            yield f"outside sees {pod_ip} as {source}, expected {wanted}"


def forwarding(
    host: Namespace, pod: Namespace, outside: Namespace, pod_ip: str, passes: bool
) -> Iterator[str]:
    """Under an iptables FORWARD policy of drop."""
    program = "ip6tables" if ":" in pod_ip else "iptables"
    host.run(program, "-P", "FORWARD", "DROP")
    via, to = (HOST6, OUTSIDE6) if ":" in pod_ip else (HOST4, OUTSIDE4)
    outside.run("ip", "route", "replace", pod_ip, "via", via)
    source = seen_source(outside, 9998, pod, to, 9998)
    if (source is not None) != passes:
        yield f"the pod {'reaches' if source else 'does not reach'} outside past FORWARD"


def spoofed_frame_passes(host: Namespace, pod: Namespace, ifname: str, bridge: str) -> bool:
    """Whether a frame with a source MAC that is not the pod's reaches the bridge."""
    raw = socket.SOCK_RAW | socket.SOCK_NONBLOCK
    ethertype = 0x88B5  # for local experiments (IEEE 802)
    with (
        netns.socket(host.fd, socket.AF_PACKET, raw, socket.htons(ethertype)) as ear,
        netns.socket(pod.fd, socket.AF_PACKET, raw) as mouth,
    ):
        ear.bind((bridge, ethertype))
        mouth.bind((ifname, 0))
        ear.settimeout(TIMEOUT_S)
        mouth.send(b"\xff" * 6 + b"\x02\0\0\0\0\x66" + ethertype.to_bytes(2, "big") + bytes(46))
        with contextlib.suppress(OSError):
            return b"\x02\0\0\0\0\x66" in ear.recv(2048)
    return False


def mentions(host: Live, texts: list[str], *, living: bool) -> Iterator[str]:
    """Pod addresses that are still named in some rule or element.

    A pod that is `living`, and lost only a part of a chain, stays bound to its address.
    """
    rules = host.rule_text(bridge=not living)
    for text in texts:
        if text in rules:
            yield f"the rules still name {text}"
