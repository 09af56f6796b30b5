"""No spoofed address leaves a pod. Bridge table `podwire-spoof`, hooked before everything else.

On a bridge nothing else checks a frame's source: reverse path filters see the bridge, not the port.
A pod's port is bound to one MAC and the pod's addresses; what a bound port sends must carry them,
in the Ethernet header, in the IP header, and where ARP and neighbour advertisements claim them
(otherwise a pod could take over its neighbours' traffic, or the gateway's). A pod is no router, so
its router advertisements and redirects are dropped, and it speaks nothing but IPv4, IPv6 and ARP:
a tagged or encapsulated frame could hide any source.

Ports that are not bound are none of our business. Bind before the pod's processes start.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from podwire.datapath.nftables.fixed import FixedTable
from podwire.errors import KernelError
from podwire.kernel.nftables import BRIDGE, Element, NfTables, Set, Transaction, concat
from podwire.net import Address, link_local

TABLE = "podwire-spoof"

_PORTS, _MACS = Set(BRIDGE, TABLE, "ports"), Set(BRIDGE, TABLE, "macs")
_IPV4, _IPV6 = Set(BRIDGE, TABLE, "ipv4"), Set(BRIDGE, TABLE, "ipv6")
_TARGETS = Set(BRIDGE, TABLE, "ipv6-targets")
_ANY_ADDRESS = Set(BRIDGE, TABLE, "any-address")
_SETS = (_PORTS, _MACS, _IPV4, _IPV6, _TARGETS, _ANY_ADDRESS)

# ARP probes (RFC 5227) come from 0.0.0.0, duplicate address detection and MLD reports from ::.
# nft 1.0.6 has no name for a neighbour advertisement's target, so it is spelled @th,64,128, and a
# raw field needs a set of its own type.
_SCRIPT = f"""
table bridge {TABLE} {{
  set ports {{ type ifname; }}
  set macs {{ type ifname . ether_addr; }}
  set any-address {{ type ifname . ether_addr; }}
  set ipv4 {{ type ifname . ether_addr . ipv4_addr; }}
  set ipv6 {{ type ifname . ether_addr . ipv6_addr; }}
  set ipv6-targets {{ typeof iifname . ether saddr . @th,64,128; }}
  chain arp-claims {{ }}
  chain ipv6-claims {{ }}
  chain prerouting {{
    type filter hook prerouting priority -300; policy accept;
  }}
}}
flush chain bridge {TABLE} arp-claims
flush chain bridge {TABLE} ipv6-claims
flush chain bridge {TABLE} prerouting
table bridge {TABLE} {{
  chain arp-claims {{
    iifname . ether saddr != @macs drop
    iifname . arp saddr ether != @macs drop
    arp saddr ip 0.0.0.0 accept
    iifname . ether saddr . arp saddr ip @ipv4 accept
    drop
  }}
  chain ipv6-claims {{
    icmpv6 type {{ nd-router-advert, nd-redirect }} drop
    icmpv6 type nd-neighbor-advert iifname . ether saddr . @th,64,128 != @ipv6-targets drop
    iifname . ether saddr . ip6 saddr @ipv6 accept
    ip6 saddr :: meta l4proto ipv6-icmp iifname . ether saddr @macs accept
    drop
  }}
  chain prerouting {{
    iifname != @ports accept
    iifname . ether saddr @any-address accept
    ether type ip iifname . ether saddr . ip saddr @ipv4 accept
    ether type vmap {{ arp : goto arp-claims, ip6 : goto ipv6-claims }}
    drop
  }}
}}
"""


class Binding(NamedTuple):
    """What the port may send from."""

    mac: bytes
    addresses: frozenset[Address]


class SpoofGuard:
    """The bindings of one network namespace. Usable from several threads.

    Additions are at once. Removals wait for `flush`, for they cost a grace period of the kernel:
    a binding of a port that is gone lets nobody send anything.
    """

    def __init__(self, netns_fd: int | None = None) -> None:
        self._nft = NfTables(netns_fd)
        self._structure = FixedTable(self._nft, BRIDGE, TABLE, _SCRIPT)
        self._lock = threading.Lock()
        self._bound: dict[str, Binding] = {}
        self._leaving: dict[str, Binding] = {}

    def close(self) -> None:
        self._nft.close()

    def start(self) -> None:
        """Make the table, or adopt an earlier process's with its bindings. Raises KernelError."""
        with self._lock:
            self._structure.make()

    def restore(self, bindings: Mapping[str, tuple[bytes, Iterable[Address]]]) -> None:
        """Make these ports, with their MACs and addresses, all there is."""
        with self._lock:
            self._bound = {
                ifname: Binding(mac, frozenset(addresses))
                for ifname, (mac, addresses) in bindings.items()
            }
            self._settle()

    def bind(self, host_ifname: str, mac: bytes, addresses: Iterable[Address]) -> None:
        """From now on the port sends from these only; an earlier binding is replaced.

        The link-local address made from the MAC (EUI-64) is allowed with IPv6 addresses. Without
        any address (a link without IPAM) nobody can say which is false: the MAC alone is checked.
        """
        binding = Binding(mac, frozenset(addresses))
        with self._lock:
            earlier = self._bound.get(host_ifname) or self._leaving.get(host_ifname)
            self._bound[host_ifname] = binding
            self._leaving.pop(host_ifname, None)
            self._commit([(host_ifname, earlier, binding)])

    def unbind(self, host_ifname: str) -> None:
        """Forget a port; an unknown one is no error. The kernel hears of it by `flush`."""
        with self._lock:
            if host_ifname in self._bound:
                self._leaving[host_ifname] = self._bound.pop(host_ifname)

    def flush(self) -> None:
        """Take away what unbound ports left: one grace period for all of them."""
        with self._lock:
            leaving, self._leaving = self._leaving, {}
            self._commit([(ifname, binding, None) for ifname, binding in leaving.items()])

    def verify(self) -> list[str]:
        """Repair what somebody changed in the table, and say so."""
        with self._lock:
            repairs: list[str] = []
            if not self._structure.intact():
                self._structure.make()
                repairs.append(f"made the rules of table {TABLE} again")
            return repairs + self._settle()

    def cleanup(self) -> None:
        """Remove the table."""
        with self._lock:
            self._structure.remove()
            self._bound, self._leaving = {}, {}

    def status(self) -> dict[str, object]:
        return {"ports": len(self._bound)}

    def _commit(self, steps: Sequence[tuple[str, Binding | None, Binding | None]]) -> None:
        transaction = Transaction()
        for ifname, old, new in steps:
            before, after = _elements(ifname, old), _elements(ifname, new)
            for target in _SETS:
                transaction.delete(target, before[target] - after[target])
                transaction.add(target, after[target] - before[target])
        try:
            self._nft.commit(transaction)
        except KernelError:  # somebody changed the table: what is to be deleted is not there
            self._structure.make()
            self._settle()

    def _settle(self) -> list[str]:
        """Make the sets hold what is bound and nothing else."""
        transaction = Transaction()
        repairs: list[str] = []
        wanted = self._wanted()
        for target in _SETS:
            held = set(self._nft.elements(target))
            if held != wanted[target]:
                repairs.append(f"restored the set {TABLE} {target.name}")
            transaction.add(target, wanted[target] - held)
            transaction.delete(target, held - wanted[target])
        self._nft.commit(transaction)
        self._leaving = {}
        return repairs

    def _wanted(self) -> dict[Set, set[Element]]:
        wanted: dict[Set, set[Element]] = {target: set() for target in _SETS}
        for ifname, binding in self._bound.items():
            for target, elements in _elements(ifname, binding).items():
                wanted[target] |= elements
        return wanted


def _elements(ifname: str, binding: Binding | None) -> dict[Set, set[Element]]:
    if binding is None:
        return {target: set() for target in _SETS}
    port = ifname.encode().ljust(16, b"\0")
    mac = binding.mac
    if not binding.addresses:
        free = {_PORTS: {Element(port)}, _ANY_ADDRESS: {Element(concat(port, mac))}}
        return {target: free.get(target, set()) for target in _SETS}
    ipv4 = {a for a in binding.addresses if len(a) == 4}
    ipv6 = binding.addresses - ipv4
    if ipv6:
        ipv6 |= {link_local(mac)}
    keys6 = {Element(concat(port, mac, a)) for a in ipv6}
    return {
        _PORTS: {Element(port)},
        _MACS: {Element(concat(port, mac))},
        _IPV4: {Element(concat(port, mac, a)) for a in ipv4},
        _IPV6: keys6,
        _TARGETS: keys6,
        _ANY_ADDRESS: set(),
    }
