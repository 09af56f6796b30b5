"""New connections by frontend, counted by the programs, and the elements that decide about them."""

from __future__ import annotations

import struct
from collections.abc import Collection

from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.slots import Run
from podwire.datapath.ebpf.spelling import Lease, frontend_key
from podwire.services import Frontend, FrontendKind, ServicePort

_MANY = 256


class Hits:
    """The counters: made by programs at the first connection, kept over restarts."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs

    def keep(self, frontends: Collection[bytes]) -> None:
        """Forget all but these keys of the `frontends` map."""
        hits = self._programs.maps["hits"]
        hits.delete_batch([key for key, _ in hits.items() if key not in frontends])

    def forget(self, frontends: Collection[bytes]) -> None:
        """The frontends with these keys are gone; most of them may have had no connection."""
        hits = self._programs.maps["hits"]
        if len(frontends) > _MANY:
            hits.delete_batch([key for key, _ in hits.items() if key in frontends])
            return
        for key in frontends:
            hits.delete(key)

    def of(self, port: ServicePort, frontend: Frontend) -> int:
        """Connections that it has seen."""
        found = self._programs.maps["hits"].lookup(frontend_key(port, frontend))
        return sum(n for (n,) in struct.iter_unpack("=Q", found)) if found else 0


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
