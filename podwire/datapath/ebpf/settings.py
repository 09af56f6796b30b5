"""What holds for all Services: the node's addresses, how pods are told, and ranges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from podwire.datapath.ebpf import spelling
from podwire.datapath.ebpf.layout import (
    INTERFACE,
    NUMBER,
    AddressFlag,
    InterfaceFlag,
    mapped,
)
from podwire.datapath.ebpf.programs import Programs
from podwire.net import Address
from podwire.services import FrontendKind, ServicePort, Settings

# plain numbers: a flag costs half a microsecond each time, here at every address
_CLUSTER_IP, _SERVICE = AddressFlag.CLUSTER_IP.value, AddressFlag.SERVICE.value


class AddressChange(NamedTuple):
    """Entries to write (`added` of them new) before frontends, and keys to remove after them."""

    written: dict[bytes, bytes]
    added: int
    removed: list[bytes]


class AddressCounts:
    """How many frontends each address has: what the `addresses` map holds follows from it.

    `node` is what it says of the node's own addresses.
    """

    def __init__(self) -> None:
        self.node: Mapping[Address, int] = {}
        self._counts: dict[Address, list[int]] = {}

    def change(self, before: Iterable[ServicePort], after: Iterable[ServicePort]) -> AddressChange:
        """Count ports that go and ports that come."""
        touched: dict[Address, bool] = {}
        for ports, step in ((before, -1), (after, 1)):
            for port in ports:
                for frontend in port.frontends:
                    address = frontend.address
                    if address:
                        touched.setdefault(address, bool(self._flags(address)))
                        counts = self._counts.setdefault(address, [0, 0])
                        counts[frontend.kind != FrontendKind.CLUSTER_IP] += step
        written: dict[bytes, bytes] = {}
        removed: list[bytes] = []
        for address, was in touched.items():
            flags = self._flags(address)
            if not any(self._counts[address]):
                del self._counts[address]
            if flags:
                written[mapped(address)] = NUMBER.pack(flags)
            elif was:
                removed.append(mapped(address))
        added = sum(1 for a, was in touched.items() if not was and self._flags(a))
        return AddressChange(written, added, removed)

    def entries(self) -> dict[bytes, bytes]:
        """The whole map."""
        return {
            mapped(address): NUMBER.pack(self._flags(address))
            for address in self._counts.keys() | self.node.keys()
        }

    def _flags(self, address: Address) -> int:
        cluster, other = self._counts.get(address, (0, 0))
        flags = self.node.get(address, 0)
        if cluster:
            flags |= _CLUSTER_IP
        return flags | _SERVICE if other else flags


def write_settings(programs: Programs, settings: Settings) -> None:
    """Write everything but the addresses, and mark the interfaces that are there now."""
    programs.set_node_addresses(settings.node.addresses)
    programs.set_detection(spelling.detection(settings))
    wanted = {key: NUMBER.pack(flags) for key, flags in spelling.prefixes(settings).items()}
    prefixes = programs.maps["prefixes"]
    prefixes.update_batch(wanted.items())
    prefixes.delete_batch([key for key, _ in prefixes.items() if key not in wanted])
    if settings.config.detect_local.interface:
        _mark_interfaces(programs, settings.config.detect_local.interface)


def _mark_interfaces(programs: Programs, pattern: str) -> None:
    """Detect-local by interface: the ports of a bridge count as the bridge."""
    found = programs.dump_links()
    interfaces = programs.maps["interfaces"]
    for index, one in found.items():
        names = [one.name, *([found[one.master].name] if one.master in found else [])]
        key = NUMBER.pack(index)
        held = interfaces.lookup(key) or bytes(INTERFACE.size)
        first, second, flags, mac = INTERFACE.unpack(held)
        flags &= ~InterfaceFlag.POD
        if any(_matches(name, pattern) for name in names):
            flags |= InterfaceFlag.POD
        value = INTERFACE.pack(first, second, flags, mac)
        if value != held:
            interfaces.update(key, value)


def _matches(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
