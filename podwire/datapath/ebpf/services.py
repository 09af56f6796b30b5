"""Services on eBPF: the table's differences as map updates, in an order that traffic may watch.

Backend slots are written before a frontend names them, frontends before their old slots are lent
again; each frontend changes in one step. So every packet sees an old list or a new one, whole.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from podwire.datapath import Requirement
from podwire.datapath.counts import ServiceCounts
from podwire.datapath.ebpf import hits, maglev, spelling
from podwire.datapath.ebpf.balancing import Balancing
from podwire.datapath.ebpf.hits import Hits
from podwire.datapath.ebpf.layout import (
    BACKEND,
    FRONTEND,
    MAGLEV,
    MEMBER_KEY,
    NUMBER,
    FrontendFlag,
    MemberList,
    mapped,
)
from podwire.datapath.ebpf.part import TablePart
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.settings import AddressCounts, write_settings
from podwire.datapath.ebpf.slots import EMPTY, Run, Slots
from podwire.datapath.ebpf.spelling import Lease
from podwire.net import Address, Protocol
from podwire.services import (
    Backend,
    Family,
    Frontend,
    FrontendKind,
    ProxyConfig,
    ServicePort,
    ServicePortName,
    ServiceTable,
    Settings,
)

_Changes = Mapping[ServicePortName, tuple[ServicePort | None, ServicePort | None]]

_DROPS = ("no_local_endpoint", "unallocated", "source_range", "replaced")


class _Held(NamedTuple):
    port: ServicePort
    lease: Lease


class ServicesPart(TablePart[ServiceTable]):
    """A ServiceTable in maps and programs."""

    feature = "services"
    requirements = (
        Requirement(
            "net.ipv4.ip_forward", "1", "packets for backends elsewhere would not be forwarded"
        ),
        Requirement(
            "net.ipv6.conf.all.forwarding", "1", "packets for backends elsewhere would stop here"
        ),
        Requirement(
            "net.ipv4.conf.all.rp_filter",
            "2",
            "answers that bear a Service address would be dropped as spoofed",
        ),
        Requirement(
            "net.ipv4.conf.lo.accept_local",
            "1",
            "the node's own processes would not get answers from its own addresses",
        ),
        Requirement(
            "net.ipv4.conf.lo.route_localnet", "1", "node ports on 127.0.0.1 would not answer"
        ),
    )

    def __init__(
        self,
        config: ProxyConfig | None = None,
        netns_fd: int | None = None,
        *,
        programs: Programs | None = None,
        balancing: Balancing | None = None,
    ) -> None:
        super().__init__(netns_fd, programs=programs)
        self._leases: dict[ServicePortName, Lease] = {}
        self._next_service = 1
        self.balancing = balancing or Balancing()
        self._slots = Slots()
        self._tables = Slots()
        self._addresses = AddressCounts()
        self._hits = Hits(self._programs)
        self._own: frozenset[Address] = frozenset()

    def _apply(self, table: ServiceTable) -> None:
        delta = table.delta(self._table)
        if delta.settings:
            self._apply_settings(table.settings)
        if self._table is None:
            self._adopt(table)
        else:
            if delta.settings:
                self._rewrite(self._table.ports, table.settings)
            if delta.ports:
                self._change(delta.ports, table.settings)
        self._table = table

    def _start_over(self) -> None:
        super()._start_over()
        self._leases = {}
        self._slots, self._tables, self._addresses = Slots(), Slots(), AddressCounts()

    def flush(self) -> None:
        """Make slots of lists that are gone available again, after a grace period."""
        with self._programs.lock:
            if self._slots.waiting or self._tables.waiting:
                self._programs.growing["frontends"].settle()
                self._slots.settle()
                self._tables.settle()

    def verify(self) -> list[str]:
        """Compare the maps with the table, repair, and name each repair."""
        with self._programs.lock:
            repairs = [f"attached to new interface {i}" for i in self._programs.sync_links()]
            return repairs + super().verify()

    def _verify(self, table: ServiceTable) -> list[str]:
        repairs: list[str] = []
        write_settings(self._programs, table.settings)
        for kind, wanted in self._spell(self._held(table.ports), table.settings).items():
            if wrong := self._programs.growing[kind].replace(wanted):
                repairs.append(f"{wrong} entries of map {kind}")
        return repairs

    def status(self) -> dict[str, object]:
        """What is held, and packets refused and dropped for want of a Service or a backend."""
        growing, outcomes = self._programs.growing, self._programs.outcomes()
        return {
            "service_ports": len(self._leases),
            **{kind: growing[kind].held for kind in ("frontends", "members", "ranges")},
            "backend_slots": self._slots.top,
            "table_slots": self._tables.top,
            "balancing": self.balancing.words(),
            "packets_rejected": outcomes.get("rejected", 0),
            "packets_dropped": sum(outcomes.get(name, 0) for name in _DROPS),
        }

    def counts(self, port: ServicePort) -> ServiceCounts:
        """What decides about a port, and the new connections since it has been there."""
        with self._programs.lock:
            lease = self._leases.get(port.name)
            if lease is None:
                return ServiceCounts()
            frontends = {
                each: (hits.element(port, each, lease), self._hits.of(port, each))
                for each in port.frontends
            }
            return ServiceCounts(frontends, self._hits.of_backends(port, lease))

    # --- the difference ------------------------------------------------------------------------

    def _change(self, ports: _Changes, settings: Settings) -> None:
        before = {n: _Held(old, self._leases[n]) for n, (old, _) in ports.items() if old}
        after = {
            n: _Held(new, self._lease(new, before.get(n))) for n, (_, new) in ports.items() if new
        }
        kept = {run for held in before.values() for run in held.lease.runs}
        tables = {held.lease.maglev for held in before.values()}
        self._write_slots(after.values(), kept)
        self._write_tables(after.values(), tables)
        growing = self._programs.growing
        addresses = self._addresses.change(
            (held.port for held in before.values()), (held.port for held in after.values())
        )
        growing["addresses"].write(addresses.written, addresses.added)
        gone: list[tuple[str, list[bytes]]] = []
        for kind in ("members", "ranges", "frontends"):  # a frontend comes last
            old = self._entries(kind, before.values(), settings)
            new = self._entries(kind, after.values(), settings)
            changed = {key: value for key, value in new.items() if old.get(key) != value}
            growing[kind].write(changed, len(new.keys() - old.keys()))
            gone.append((kind, list(old.keys() - new.keys())))
        for kind, keys in reversed(gone):  # and goes first
            growing[kind].delete(keys)
        backends = [
            {key for held in some for key in hits.backend_keys(*held)}
            for some in (before.values(), after.values())
        ]
        self._hits.forget({*gone[-1][1], *(backends[0] - backends[1])})
        growing["addresses"].delete(addresses.removed)
        self._forget_stale(ports)
        for name in before.keys() - after.keys():
            del self._leases[name]
        self._leases.update({name: held.lease for name, held in after.items()})
        for run in kept - {run for held in after.values() for run in held.lease.runs}:
            self._slots.give_back(run)
        for run in tables - {held.lease.maglev for held in after.values()}:
            self._tables.give_back(spelling.table_room(run))

    def _lease(self, port: ServicePort, before: _Held | None) -> Lease:
        """Slots for the lists of `port`; it keeps those of lists that stay the same."""
        if before is None:
            service = self._next_service
            self._next_service += 1
            known: dict[tuple[Backend, ...], Run] = {}
        else:
            service = before.lease.service
            known = {
                before.port.cluster: before.lease.cluster,
                before.port.local: before.lease.local,
            }
        known[()] = EMPTY
        for backends in (port.cluster, port.local):
            if backends not in known:
                known[backends] = self._slots.take(len(backends))
        table = self._table_run(port, before)
        return Lease(service, known[port.cluster], known[port.local], table)

    def _table_run(self, port: ServicePort, before: _Held | None) -> Run:
        """Room for the Maglev table of `port`, if it has one; it keeps that of the same list."""
        backends = spelling.external_list(port)
        size = self.balancing.table_size
        if not self.balancing.has_table(port):
            return EMPTY
        if (
            before is not None
            and before.lease.maglev.size == size
            and spelling.external_list(before.port) == backends
        ):
            return before.lease.maglev
        room = spelling.table_room(Run(0, size))
        return Run(self._tables.take(room.size).first, size)

    def _forget_stale(self, ports: _Changes) -> None:
        """UDP flows to what serves no more would go on into the void: end them."""
        stale: list[bytes] = []
        closing: set[Backend] = set()
        for name, (old, new) in ports.items():
            if name.protocol != Protocol.UDP:
                continue
            if old:
                service = self._leases[name].service
                gone = set(old.serving).difference(new.serving if new else ())
                lost = _lost_frontends(old, new or old)
                closing.update(old.serving if lost else gone)
                for backend in gone:
                    address, number = mapped(backend[:-2]), backend[-2:]
                    stale.append(MEMBER_KEY.pack(address, service, number, MemberList.CLUSTER))
                for frontend in lost:
                    stale += self._flows_to(name.family, frontend, service)
            if new:  # what was reachable past all Services until now; ClusterIPs never were
                for frontend in set(new.frontends).difference(old.frontends if old else ()):
                    if frontend.kind != FrontendKind.CLUSTER_IP:
                        stale += self._flows_to(name.family, frontend, 0)
        if stale:
            self.connections.forget(stale)
        if closing:
            self._programs.close_sockets({(b[:-2], b[-2:]) for b in closing})

    def _flows_to(self, family: Family, frontend: Frontend, service: int) -> Iterator[bytes]:
        size = 4 if family == 4 else 16
        number = frontend.port.to_bytes(2, "big")
        own = [each for each in self._own if len(each) == size]
        for address in [frontend.address] if frontend.address else own:
            yield MEMBER_KEY.pack(mapped(address), service, number, MemberList.CLUSTER)

    # --- everything ----------------------------------------------------------------------------

    def _adopt(self, table: ServiceTable) -> None:
        """The first table of this process: keep ids and slots that an earlier one gave out."""
        known = {
            key: FRONTEND.unpack(value)
            for key, value in self._programs.growing["frontends"].map.items()
        }
        slots = b"".join(value for _, value in self._programs.growing["backends"].map.items())
        runs = {Run(*fact[at : at + 2]) for fact in known.values() for at in (3, 5)} - {EMPTY}
        tables = {Run(*fact[7:]) for fact in known.values()} - {EMPTY}
        self._slots.adopt(runs)
        self._tables.adopt({spelling.table_room(run) for run in tables})
        self._next_service = max((fact[0] for fact in known.values()), default=0) + 1
        for name, port in table.ports.items():
            before = None
            if known:
                keys = (spelling.frontend_key(port, each) for each in port.frontends)
                facts = [known[key] for key in keys if key in known]
                before = self._recognise(port, facts, slots) if facts else None
            self._leases[name] = self._lease(port, before)
        self._addresses.change((), table.ports.values())
        self._rewrite(table.ports, table.settings, tables)
        self._hits.keep(partial(self._counted, table))
        for run in runs - {run for lease in self._leases.values() for run in lease.runs}:
            self._slots.give_back(run)
        for run in tables - {lease.maglev for lease in self._leases.values()}:
            self._tables.give_back(spelling.table_room(run))

    def _counted(self, table: ServiceTable) -> set[bytes]:
        """Keys of all that programs count connections of."""
        counted = set(self._programs.growing["frontends"].read())
        for name, port in table.ports.items():
            counted.update(hits.backend_keys(port, self._leases[name]))
        return counted

    def _recognise(self, port: ServicePort, facts: Sequence[Sequence[int]], slots: bytes) -> _Held:
        """What its frontends in the kernel say of `port`; lists that differ do not count.

        A table that was written for the same list is what would be written now.
        """
        service = facts[0][0]
        kept: dict[tuple[Backend, ...], Run] = {}
        for backends, at in ((port.cluster, 3), (port.local, 5)):
            run = Run(*facts[0][at : at + 2])
            start = run.first * BACKEND.size
            wanted = spelling.backends(backends, service, self._own)
            if run.size == len(backends) and slots[start : start + len(wanted)] == wanted:
                kept[backends] = run
        cluster, local = (some if some in kept else () for some in (port.cluster, port.local))
        external = FrontendFlag.LOCAL if port.external_local else FrontendFlag(0)
        tables = (
            Run(*fact[7:])
            for fact in facts
            if fact[7:] != EMPTY and fact[1] & FrontendFlag.LOCAL == external
        )
        runs = kept.get(cluster, EMPTY), kept.get(local, EMPTY)
        lease = Lease(service, runs[0], runs[1], next(tables, EMPTY))
        return _Held(spelling.with_lists(port, cluster, local), lease)

    def _rewrite(
        self,
        ports: Mapping[ServicePortName, ServicePort],
        settings: Settings,
        tables: set[Run] | None = None,
    ) -> None:
        """Write every port anew: at the start, and when the node's addresses changed.

        `tables` (default: all) are there already.
        """
        held = self._held(ports)
        spelled = self._spell(held, settings)
        room = {kind: len(wanted) for kind, wanted in spelled.items()}
        self._programs.reserve({**room, "backends": self._slots.top, "tables": self._tables.top})
        self._write_slots(held, set())
        self._write_tables(
            held, {lease.maglev for lease in self._leases.values()} if tables is None else tables
        )
        for kind, wanted in spelled.items():
            self._programs.growing[kind].replace(wanted)

    def _held(self, ports: Mapping[ServicePortName, ServicePort]) -> list[_Held]:
        return [_Held(port, self._leases[name]) for name, port in ports.items()]

    def _spell(self, held: Sequence[_Held], settings: Settings) -> dict[str, dict[bytes, bytes]]:
        """All entries of all maps but the slots."""
        return {
            "members": self._entries("members", held, settings),
            "ranges": self._entries("ranges", held, settings),
            "addresses": self._addresses.entries(),
            "frontends": self._entries("frontends", held, settings),
        }

    # --- maps ----------------------------------------------------------------------------------

    def _entries(self, kind: str, ports: Iterable[_Held], settings: Settings) -> dict[bytes, bytes]:
        dsr = self.balancing.mode == "dsr"
        out: dict[bytes, bytes] = {}
        for port, lease in ports:
            if kind == "frontends":
                out.update(spelling.frontends(port, lease, settings, dsr=dsr))
            elif kind == "members":
                out.update(spelling.members(port, lease))
            else:
                out.update(spelling.ranges(port, lease))
        return out

    def _write_slots(self, ports: Iterable[_Held], kept: set[Run]) -> None:
        """Write the lists of `ports`, but for runs that are `kept` and so hold them already."""
        growing = self._programs.growing["backends"]
        growing.reserve(self._slots.top)
        runs = {
            run: (backends, lease.service)
            for port, lease in ports
            for run, backends in ((lease.cluster, port.cluster), (lease.local, port.local))
            if run.size and run not in kept
        }
        keys = array("I")
        for first, size in runs:
            keys.extend(range(first, first + size))
        growing.map.update_packed(
            keys.tobytes(), b"".join(spelling.backends(*list, self._own) for list in runs.values())
        )

    def _write_tables(self, ports: Iterable[_Held], kept: set[Run]) -> None:
        """Write the Maglev tables of `ports`, but for those that are `kept`."""
        growing = self._programs.growing["tables"]
        growing.reserve(self._tables.top)
        for port, lease in ports:
            if lease.maglev.size and lease.maglev not in kept:
                entries = maglev.table(spelling.external_list(port), lease.maglev.size)
                first, size = spelling.table_room(lease.maglev)
                growing.map.update_packed(
                    b"".join(map(NUMBER.pack, range(first, first + size))),
                    entries.ljust(size * MAGLEV.size, b"\0"),
                )

    def _apply_settings(self, settings: Settings) -> None:
        self._own = spelling.own_addresses(settings)
        self._addresses.node = spelling.node_flags(settings)
        write_settings(self._programs, settings)


def _lost_frontends(old: ServicePort, new: ServicePort) -> list[Frontend]:
    """By which addresses and ports a Service's port is reached no more."""
    kept = {(address, number) for _, address, number in new.frontends}
    return [frontend for frontend in old.frontends if frontend[1:] not in kept]
