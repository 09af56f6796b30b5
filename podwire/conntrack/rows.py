"""Entries, events and tallies as JSON: what `podwire conntrack` prints and its `--json` gives."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from podwire.conntrack.attribution import (
    MASQUERADE_PORTS,
    Peer,
    Tally,
    attribute,
)
from podwire.conntrack.names import Names, Role
from podwire.kernel.ctnetlink import Counters, Entry, Status, Tuple
from podwire.kernel.ctnetlink.counting import flow_key
from podwire.net import format_address, protocol_name

SNAT_WARNING = 0.8
"""Of the local port range in use for one destination: the next step is refused connections."""


def entry_row(entry: Entry, names: Names) -> dict[str, Any]:
    """One entry: both tuples with names beside addresses, so that NAT is seen."""
    flow = attribute(flow_key(entry), names)
    return {
        "protocol": protocol_name(entry.original.protocol),
        "state": entry.state_name,
        "tracked": Status.CONFIRMED in entry.status,  # otherwise found among pods' sockets
        "status": [bit.name for bit in Status if entry.status & bit],
        "kind": flow.kind.value,
        "service": f"{flow.service.namespace}/{flow.service.name}" if flow.service else None,
        "service_port": flow.service.port_name if flow.service else None,
        "original": _direction(entry.original, names),
        "reply": _direction(entry.reply, names),
        "timeout_s": entry.timeout_s,
        "mark": entry.mark,
        "zone": entry.zone,
        "labels": f"{entry.labels:#x}" if entry.labels else None,
        "helper": entry.helper or None,
        "packets": _pair(entry.counters_original, entry.counters_reply, "packets"),
        "bytes": _pair(entry.counters_original, entry.counters_reply, "bytes"),
        "age_s": _age_s(entry),
    }


def _direction(direction: Tuple, names: Names) -> dict[str, Any]:
    return {
        "source": format_address(direction.source),
        "source_port": direction.source_port,
        "source_name": names.place(direction.source).name or None,
        "destination": format_address(direction.destination),
        "destination_port": direction.destination_port,
        "destination_name": names.place(direction.destination).name or None,
    }


def _pair(original: Counters | None, reply: Counters | None, field: str) -> list[int] | None:
    """None: accounting is off (net.netfilter.nf_conntrack_acct)."""
    if original is None or reply is None:
        return None
    return [getattr(original, field), getattr(reply, field)]


def _age_s(entry: Entry) -> float | None:
    """None: timestamps are off (net.netfilter.nf_conntrack_timestamp)."""
    if entry.start_ns is None:
        return None
    end_ns = entry.stop_ns or time.time_ns()
    return round(max(0, end_ns - entry.start_ns) / 1e9, 3)


def tally_groups(tally: Tally, local_ports: tuple[int, int], most: int) -> dict[str, Any]:
    """The largest of each group, for `top`."""
    pods = tally.by_name(Role.POD)
    groups: dict[str, list[dict[str, Any]]] = {
        "pod": _peers(pods),
        "service": [
            {"name": name, "entries": peer.answered, "unreplied": peer.unreplied}
            for name, peer in tally.by_service().items()
        ],
        "remote": _peers(tally.by_name(Role.OUTSIDE)),
        "node": _peers(tally.by_name(Role.NODE)),
        "state": [
            {"name": f"{protocol} {state}", "entries": count}
            for (protocol, state), count in tally.by_state().items()
        ],
        "kind": [{"name": kind.value, "entries": count} for kind, count in tally.kinds.items()],
        "snat": snat_rows(tally, local_ports),
    }
    for name, rows in groups.items():
        rows.sort(key=lambda row: (-row["entries"], row["name"]))
        groups[name] = rows[:most]
    return {
        "entries": tally.total,
        "translated": tally.natted,
        "unreplied": tally.total - tally.with_status(Status.SEEN_REPLY),
        "assured": tally.with_status(Status.ASSURED),
        "offloaded": tally.with_status(Status.OFFLOAD),
        "gone_pods": tally.gone_pods(),
        "approximate": tally.approximate,
        "groups": groups,
    }


def _peers(peers: Mapping[str, Peer]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "entries": peer.entries,
            "opened": peer.opened,
            "answered": peer.answered,
            "services": peer.services,
            "outside": peer.outside,
            "unreplied": peer.unreplied,
        }
        for name, peer in peers.items()
    ]


def snat_rows(tally: Tally, local_ports: tuple[int, int]) -> list[dict[str, Any]]:
    """Source ports in use for each (node address, destination), largest first.

    They are held against the local port range, from which clients choose. Masquerading keeps a
    client's port where it is free and else takes any from 1024 up.
    """
    size = local_ports[1] - local_ports[0] + 1
    rows = [
        {
            "name": f"{format_address(target.node_address)} → "
            f"{format_address(target.destination)}:{target.destination_port}"
            f"/{protocol_name(target.protocol)}",
            "node_address": format_address(target.node_address),
            "destination": format_address(target.destination),
            "destination_port": target.destination_port,
            "protocol": protocol_name(target.protocol),
            "entries": used,
            "local_ports": size,
            "ratio": round(used / size, 4),
            "masquerade_ports": MASQUERADE_PORTS,
            "warning": used / size >= SNAT_WARNING,
        }
        for target, used in tally.snat.items()
    ]
    return sorted(rows, key=lambda row: -row["entries"])
