"""Ports of the node that lead to a pod: nf_tables table ``inet podwire-hostports``.

The structure never changes; a mapping is a few elements. What the pod could not answer otherwise is
marked (ct mark 0x2000, CNI's bit 13) where its destination is changed and masqueraded on the way
out: connections from the pod's own network, which would be answered past this host, and those from
127.0.0.0/8, which the pod would answer to itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from podwire.kernel import ctnetlink, link, route
from podwire.kernel.netlink import NetlinkSocket
from podwire.kernel.nftables import INET, Element, Set, concat
from podwire.net import Address, Protocol
from podwire.wiring import HostPort, HostPorts, PodAddress
from podwire.wiring.tables import PodTable

TABLE = "podwire-hostports"
MARK = 0x2000
_LOOPBACK = b"\x7f\0\0\0"

_FAMILY = """
 map any{v} {{ type inet_proto . inet_service : {a} . inet_service; }}
 map at{v} {{ type {a} . inet_proto . inet_service : {a} . inet_service; }}
 set anylocal{v} {{ type inet_proto . inet_service . {a}; flags interval; }}
 set atlocal{v} {{ type {a} . inet_proto . inet_service . {a}; flags interval; }}
 chain lookup{v} {{
  {ip} daddr . meta l4proto . th dport . {ip} saddr @atlocal{v} ct mark set ct mark | {mark}
  dnat {ip} to {ip} daddr . meta l4proto . th dport map @at{v}
  meta l4proto . th dport . {ip} saddr @anylocal{v} ct mark set ct mark | {mark}
  dnat {ip} to meta l4proto . th dport map @any{v}
 }}"""

# Right after the Services' own changes of destination at -100: a Service wins over a host port.
#
# A link that may carry 127.0.0.0/8 would also let its neighbours reach what listens there
# (CVE-2020-8558), so packets from outside for these addresses are dropped before all else.
_STRUCTURE = f"""
add table inet {TABLE}
flush table inet {TABLE}
table inet {TABLE} {{
{_FAMILY.format(v=4, a="ipv4_addr", ip="ip", mark=MARK)}
{_FAMILY.format(v=6, a="ipv6_addr", ip="ip6", mark=MARK)}
 chain find {{
  fib daddr type != local return
  meta l4proto != {{ tcp, udp, sctp }} return
  meta nfproto ipv4 goto lookup4
  goto lookup6
 }}
 chain martians {{
  type filter hook prerouting priority -300
  iifname != "lo" ip daddr 127.0.0.0/8 drop
 }}
 chain prerouting {{ type nat hook prerouting priority -99; jump find; }}
 chain output {{ type nat hook output priority -99; jump find; }}
 chain postrouting {{
  type nat hook postrouting priority 100
  ct mark & {MARK} == {MARK} ct status dnat masquerade
 }}
}}
"""


class HostPortRules:
    """The host ports of one namespace (`netns_fd`; default: the caller's)."""

    def __init__(self, netns_fd: int | None = None) -> None:
        self._netns_fd = netns_fd
        self._table = PodTable(TABLE, _STRUCTURE, netns_fd)
        self._host = NetlinkSocket(netns_fd=netns_fd)

    def close(self) -> None:
        self._table.close()
        self._host.close()

    def add(self, mappings: HostPorts) -> None:
        """Open the ports.

        Raises KernelError, also (EEXIST) when another pod has one of the ports; then nothing
        changed.
        """
        self._table.make()
        self._allow_local_sources(mappings)
        self._table.add(_elements(mappings))
        try:
            self._forget_flows(mappings)
        except BaseException:
            self._table.remove(_elements(mappings))
            raise

    def remove(self, mappings: HostPorts) -> None:
        """Close the ports; those that are closed already are no error."""
        self._table.remove(_elements(mappings))
        self._forget_flows(mappings)

    def check(self, mappings: HostPorts) -> list[str]:
        """How the live state differs, one sentence each."""
        return self._table.check(_elements(mappings))

    def reconcile(self, mappings: Collection[HostPorts]) -> None:
        """Make the table hold these mappings and no others."""
        self._table.settle(pair for each in mappings for pair in _elements(each))

    def cleanup(self) -> None:
        """Remove the table."""
        self._table.cleanup()

    def _allow_local_sources(self, mappings: HostPorts) -> None:
        """Let packets from 127.0.0.0/8 leave for the pods; their source is masqueraded after."""
        for target in mappings.targets:
            if len(target.address) == 4:
                replies, _ = self._host.attempt([route.resolve(target.address)])
                for reply in replies:
                    values = {"route_localnet": 1}
                    self._host.run(link.configure(route.parse(reply).link, values))

    def _forget_flows(self, mappings: HostPorts) -> None:
        """End UDP flows of the ports: those from before are not translated, or to another pod."""
        ports = {each.port for each in mappings.ports if each.protocol == Protocol.UDP}
        if not ports:
            return
        with ctnetlink.Table(self._netns_fd) as table:
            for port in ports:
                to_port = ctnetlink.Match(protocol=Protocol.UDP, destination_port=port)
                table.delete(ctnetlink.Filter(original=to_port))


def _elements(mappings: HostPorts) -> Iterable[tuple[Set, list[Element]]]:
    for target in mappings.targets:
        version = 4 if len(target.address) == 4 else 6
        ports = [each for each in mappings.ports if _serves(each, target)]
        for name, some in (
            ("any", [each for each in ports if not any(each.host_ip)]),
            ("at", [each for each in ports if any(each.host_ip)]),
        ):
            if not some:
                continue
            yield (
                Set(INET, TABLE, f"{name}{version}"),
                [Element(_port(each), _destination(each, target)) for each in some],
            )
            if mappings.masquerade != "none":
                yield (
                    Set(INET, TABLE, f"{name}local{version}"),
                    [
                        Element(_port(each) + concat(first), None, _port(each) + concat(last))
                        for each in some
                        for first, last in _sources(mappings.masquerade, target)
                    ],
                )


def _serves(port: HostPort, target: PodAddress) -> bool:
    return not port.host_ip or len(port.host_ip) == len(target.address)


def _port(port: HostPort) -> bytes:
    """What is looked up: the address only where the mapping is for one."""
    head = concat(port.host_ip) if any(port.host_ip) else b""
    return head + concat(bytes([port.protocol]), port.port.to_bytes(2, "big"))


def _destination(port: HostPort, target: PodAddress) -> bytes:
    return concat(target.address, port.container_port.to_bytes(2, "big"))


def _sources(masquerade: str, target: PodAddress) -> Iterable[tuple[Address, Address]]:
    size = len(target.address)
    if masquerade == "all":
        yield bytes(size), b"\xff" * size
        return
    own = target.network
    yield own.first, own.last
    if size == 4:
        yield _LOOPBACK, b"\x7f\xff\xff\xff"
