"""Policies in the agent: compiler, data path, answers to `podwire policy`, drops, metrics."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import Any

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from podwire.agent import policy_api, policy_drops
from podwire.agent.control import ControlServer, Query
from podwire.agent.cutting import CuttingPart, open_and_denied
from podwire.agent.feed import Feed
from podwire.agent.logs import event
from podwire.agent.options import Options
from podwire.agent.policy_why import why
from podwire.agent.refusals import Refusals
from podwire.agent.sync import Sync
from podwire.datapath import Part
from podwire.datapath.counts import CountsPolicies
from podwire.datapath.ebpf.events import Event
from podwire.datapath.ebpf.policy import PolicyPart as EbpfPolicyPart
from podwire.datapath.nftables.policy_rules import LOG_GROUP
from podwire.errors import KernelError
from podwire.kernel.nflog import Listener
from podwire.kube.objects import ClusterNetworkPolicy, Namespace, NetworkPolicy, Node, Pod
from podwire.kube.store import Kind, Store
from podwire.policy import PolicyCompiler, PolicyTable

log = logging.getLogger("podwire.agent.policies")

KINDS: tuple[Kind, ...] = (Node, Namespace, Pod, NetworkPolicy, ClusterNetworkPolicy)


class PolicyRoom:
    """All about policies of one agent, whatever the data path.

    What is denied comes from `refusals` on eBPF, on netfilter from its log group.
    """

    def __init__(
        self, options: Options, path: Part[PolicyTable], refusals: Refusals | None = None
    ) -> None:
        self.compiler = PolicyCompiler(
            options.node_name,
            attach_own_pods="cni" not in options.parts,
            overlay=options.routing == "vxlan",
        )
        self._counted = path if isinstance(path, CountsPolicies) else None
        part = CuttingPart(path) if options.cut_established else path
        self.sync: Sync[PolicyTable] = Sync("policy", KINDS, self.compiler.update, part)
        self._drops = Feed()
        self._refusals = refusals
        if refusals is not None and isinstance(path, EbpfPolicyPart):
            refusals.name = lambda address: str(self.table.host(address))
            refusals.explain = lambda seen: self._refused(path, seen)

    @property
    def table(self) -> PolicyTable:
        assert self.sync.table is not None, "asked before the first sync"
        return self.sync.table

    def serve(self, control: ControlServer, store: Store, _: object) -> None:
        """Answer `podwire policy`."""

        def answer(path: str, function: Any) -> None:
            control.route(f"/v1/policy{path}", lambda query: function(self.table, query))

        answer("", policy_api.listing)
        answer("/show", policy_api.show)
        answer("/lint", policy_api.lint)
        answer("/matrix", policy_api.matrix)
        control.route("/v1/policy/diff", self._diff)
        control.route("/v1/policy/why", lambda query: why(store, self.table, query))
        control.route(
            "/v1/policy/applied",
            lambda query: policy_api.applied(self.table, query, self._enforced()),
        )
        control.route("/v1/policy/counts", lambda _: self.counts())
        control.stream("/v1/policy/drops", self._drops.follow)

    def _enforced(self) -> bool:
        return self.sync.path is not None and self.sync.retry_at is None and not self.sync.error

    async def _diff(self, query: Query) -> dict[str, Any]:
        """The evaluator's answer, and the connections of this node that would be cut."""
        before = self.table
        after = policy_api.proposed(before, query)
        found = policy_api.diff(before, after)
        flows = await asyncio.to_thread(open_and_denied, before, after)
        return {**found, "connections": [policy_api.flow(after, entry) for entry in flows]}

    def counts(self) -> list[dict[str, Any]]:
        """How often each policy decided, by verdict and direction."""
        if self._counted is None:
            return []
        return [
            {
                "policies": [str(ref) for ref in count.policies],
                "direction": count.direction.value,
                "verdict": count.verdict.value,
                "packets": count.packets,
            }
            for count in self._counted.counts()
        ]

    # --- drops ---

    async def run(self, agent: Any) -> None:
        """Read what netfilter logs, until cancelled."""
        agent.metrics.registry.register(PolicyCollector(self))
        if self._refusals is not None:
            return
        try:
            listener = Listener(LOG_GROUP)
        except KernelError as error:
            event(log, logging.WARNING, "drops are not logged", error=error)
            return
        loop = asyncio.get_running_loop()
        loop.add_reader(listener.fileno(), self._heard, listener)
        try:
            await asyncio.Event().wait()
        finally:
            loop.remove_reader(listener.fileno())
            listener.close()

    def _heard(self, listener: Listener) -> None:
        for packet in listener.drain():
            self._tell(policy_drops.logged(self.table, packet, time.time()))

    def _refused(self, path: EbpfPolicyPart, seen: Event) -> str:
        drop = policy_drops.refused(self.table, seen, path.ruling(seen.ruling))
        self._tell(drop)
        return drop["reason"]

    def _tell(self, drop: dict[str, Any]) -> None:
        event(log, logging.INFO, "policy", verdict=drop["verdict"],
              source=drop["source_name"], destination=drop["destination_name"],
              port=f"{drop['protocol']}/{drop['port']}",
              policies=",".join(drop["policies"]))  # fmt: skip
        self._drops.publish(drop)


class PolicyCollector(Collector):
    """`podwire_policy_connections_total` by policy, direction and verdict.

    A default deny counts for every policy that isolates the pod: none of them alone decides.
    """

    def __init__(self, room: PolicyRoom) -> None:
        self._room = room

    def collect(self) -> Iterable[CounterMetricFamily]:
        family = CounterMetricFamily(
            "podwire_policy_connections",
            "First packets of connections that policies decided on",
            labels=["policy", "direction", "verdict"],
        )
        totals: dict[tuple[str, str, str], int] = {}
        for row in self._room.counts():
            for policy in row["policies"] or ["none"]:
                key = (policy, row["direction"], row["verdict"])
                totals[key] = totals.get(key, 0) + row["packets"]
        for key, packets in totals.items():
            family.add_metric(list(key), packets)
        yield family
