"""How Services are balanced on this data path: what the operator chose."""

from __future__ import annotations

from dataclasses import dataclass

from podwire.datapath.ebpf import maglev
from podwire.datapath.ebpf.spelling import external_list
from podwire.services import ServicePort

ALGORITHMS = ("random", "maglev")
MODES = ("snat", "dsr")


@dataclass(frozen=True)
class Balancing:
    """The words and defaults are Cilium's `loadBalancer` section.

    `algorithm` holds for what comes from outside the cluster to NodePorts, externalIPs and load
    balancer IPs; within it, choice is always random. A Service may ask for another.
    """

    algorithm: str = "random"
    table_size: int = maglev.DEFAULT_SIZE
    mode: str = "snat"
    """Whether a backend on another node is asked by this node, or answers the client itself."""

    def has_table(self, port: ServicePort) -> bool:
        """Whether external traffic to `port` goes by a Maglev table."""
        return (
            (port.algorithm or self.algorithm) == "maglev"
            and port.externally_accessible
            and maglev.needs_table(len(external_list(port)), self.table_size)
        )

    def of(self, port: ServicePort) -> str:
        """How external traffic to `port` is balanced, in words."""
        if not port.externally_accessible:
            return ""
        how = "at random"
        if len(external_list(port)) == 1:
            how = "to the only backend"
        elif self.has_table(port):
            how = f"by a Maglev table of {self.table_size} entries"
        if self.mode == "dsr" and not port.external_local:
            how += ", other nodes' backends answer the client directly"
        return how

    def words(self) -> str:
        """For the status."""
        return f"{self.algorithm} {self.mode}"
