"""New connections by frontend and backend, counted by the programs; the elements that decide."""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable, Iterator

from podwire.datapath.ebpf.layout import HIT_KEY, mapped
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.slots import Run
from podwire.datapath.ebpf.spelling import Lease, frontend_key
from podwire.services import Backend, Frontend, FrontendKind, ServicePort

_MANY = 256


class Hits:
    """The counters: made by programs at the first connection, kept over restarts.

    Keys are those of the `frontends` map, and `backend_keys`.
    """

    def __init__(self, programs: Programs) -> None:
        self._programs = programs

    def keep(self, keys: Callable[[], Collection[bytes]]) -> None:
        """Forget all but these, which are asked for if there are any."""
        hits = self._programs.maps["hits"]
        held = [key for key, _ in hits.items()]
        if held:
            kept = keys()
            hits.delete_batch([key for key in held if key not in kept])

    def forget(self, keys: Collection[bytes]) -> None:
        """What these count is gone; most of them may have had no connection."""
        hits = self._programs.maps["hits"]
        if len(keys) > _MANY:
            hits.delete_batch([key for key, _ in hits.items() if key in keys])
            return
        for key in keys:
            hits.delete(key)

    def of(self, port: ServicePort, frontend: Frontend) -> int:
        """Connections that it has seen."""
        return self._count(frontend_key(port, frontend))

    def of_backends(self, port: ServicePort, lease: Lease) -> dict[Backend, int]:
        """Connections that each backend was chosen for."""
        backends = list(dict.fromkeys((*port.cluster, *port.local)))
        keys = backend_keys(port, lease, backends)
        return {each: self._count(key) for each, key in zip(backends, keys, strict=True)}

    def _count(self, key: bytes) -> int:
        found = self._programs.maps["hits"].lookup(key)
        return sum(n for (n,) in struct.iter_unpack("=Q", found)) if found else 0


def backend_keys(
    port: ServicePort, lease: Lease, backends: Iterable[Backend] | None = None
) -> Iterator[bytes]:
    """Where connections of backends (default: all) are counted."""
    for each in {*port.cluster, *port.local} if backends is None else backends:
        yield HIT_KEY.pack(mapped(each[:-2]), each[-2:], port.name.protocol, lease.service)


def element(port: ServicePort, frontend: Frontend, lease: Lease) -> str:
    """What decides about a frontend, in words."""
    external = frontend.kind != FrontendKind.CLUSTER_IP
    local = port.is_local(frontend.kind)
    how = [_slots("local", lease.local)] if local else []
    if external or not local:
        how.append(_slots("cluster", lease.cluster))
    if external and lease.maglev.size:
        how.append(f"from outside by {lease.maglev.size:,} entries of map tables")
    if port.affinity_timeout_s:
        how.append("map affinities first")
    return f"map frontends (service {lease.service}): {', '.join(how)}"


def _slots(name: str, run: Run) -> str:
    if not run.size:
        return f"no {name} backends"
    last = run.first + run.size - 1
    slots = f"slot {run.first}" if run.size == 1 else f"slots {run.first}-{last}"
    return f"{name} backends in {slots}"
