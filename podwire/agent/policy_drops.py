"""What `podwire policy drops` shows: a packet that the kernel refused, with names and the reason.

The kernel says which packet; the table says by which rule. The two may differ for a moment after a
change of policies.
"""

from __future__ import annotations

from typing import Any

from podwire.datapath.ebpf.connections import Flow
from podwire.datapath.ebpf.events import Event
from podwire.datapath.ebpf.layout import Reason
from podwire.datapath.ebpf.rulings import Ruling
from podwire.kernel.nflog import Logged
from podwire.net import Protocol, format_address, protocol_name
from podwire.policy import Direction, Judgement, Packet, PolicyTable, Verdict

_CHANGED = "the policies have changed since"


def logged(table: PolicyTable, packet: Logged, now_s: float) -> dict[str, Any]:
    """A packet that netfilter logged, with names and the policy that decides."""
    judgement = _judge(table, packet)
    deciding = judgement.deciding
    if judgement.verdict is Verdict.ALLOW:
        reason, policies = _CHANGED, []
    else:
        refs = [deciding.policy] if deciding.policy else list(deciding.isolating)
        reason, policies = str(deciding), [str(ref) for ref in refs]
    flow = Flow(*packet[1:3], packet.source_port, packet.port, packet.protocol)
    verdict = Verdict.AUDIT if "audited" in packet.prefix else Verdict.DENY
    return _drop(table, now_s, verdict, flow, deciding.direction, policies, reason)


def refused(table: PolicyTable, event: Event, ruling: Ruling | None) -> dict[str, Any]:
    """A packet that eBPF refused. The kernel says whose doing it is, the table by which rule."""
    flow = event.flow
    if flow.protocol in (Protocol.ICMP, Protocol.ICMPV6):
        flow = flow._replace(source_port=0, destination_port=0)
    judged = table.judge(
        Packet(
            flow.source,
            flow.destination,
            flow.protocol,
            flow.destination_port,
            via_service=flow.source == flow.destination,
        )
    )
    decision = judged.egress if event.egress else judged.ingress
    verdict = Verdict.AUDIT if event.reason is Reason.POLICY_AUDIT else Verdict.DENY
    policies = ruling.policies if ruling is not None else ()
    refs = (decision.policy,) if decision.policy else decision.isolating
    same = ruling is not None and (decision.verdict, refs) == (verdict, policies)
    reason = str(decision) if same else _CHANGED
    names = [str(ref) for ref in policies]
    return _drop(table, event.time_s, verdict, flow, decision.direction, names, reason)


def _drop(
    table: PolicyTable,
    time_s: float,
    verdict: Verdict,
    flow: Flow,
    direction: Direction,
    policies: list[str],
    reason: str,
) -> dict[str, Any]:
    return {
        "time": time_s,
        "verdict": verdict.value,
        "source": format_address(flow.source),
        "source_port": flow.source_port,
        "source_name": str(table.host(flow.source)),
        "destination": format_address(flow.destination),
        "destination_name": str(table.host(flow.destination)),
        "protocol": protocol_name(flow.protocol),
        "port": flow.destination_port,
        "direction": direction.value,
        "policies": policies,
        "reason": reason,
    }


def _judge(table: PolicyTable, packet: Logged) -> Judgement:
    """The table's judgement of a packet seen on the wire, after destination NAT."""
    return table.judge(
        Packet(
            packet.source,
            packet.destination,
            packet.protocol,
            packet.port,
            packet.icmp_type,
            via_service=packet.source == packet.destination,
        )
    )
