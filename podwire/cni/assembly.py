"""Puts the parts of CNI together for the namespace of the calling thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from podwire.cni.collaborators import Collaborators, CursorPool, SpoofGuard, boot_time
from podwire.cni.lifecycle import Lifecycle
from podwire.cni.plan import NodeConfig
from podwire.ipam.pool import Pool
from podwire.ipam.state import State
from podwire.wiring import Attachment, Wiring
from podwire.wiring.bridge import BridgeWiring
from podwire.wiring.firewall import ForwardFirewall
from podwire.wiring.hostports import HostPortRules
from podwire.wiring.masquerade import MasqueradeRules
from podwire.wiring.meters import Meters
from podwire.wiring.ptp import PtpWiring

STATE_FILE = "podwire.db"


def assemble(
    state: State,
    *,
    node: Callable[[], NodeConfig] = NodeConfig,
    admit: Callable[[Attachment], None] = lambda _: None,
    dismiss: Callable[[Attachment], None] = lambda _: None,
    guard: SpoofGuard | None = None,
    pool: CursorPool | None = None,
    wirings: Mapping[str, Wiring] | None = None,
    now: Callable[[], float] = boot_time,
) -> Lifecycle:
    """The life of attachments on this node.

    `wirings` are more than the bridge's and ptp's; `pool` replaces the host's own, and then has
    been told what `state` remembers.
    """
    return Lifecycle(
        Collaborators(
            state=state,
            pool=pool or restored_pool(state, now),
            wirings={"bridge": BridgeWiring(), "ptp": PtpWiring(), **(wirings or {})},
            meters=Meters(),
            host_ports=HostPortRules(),
            masquerade=MasqueradeRules(),
            firewall=ForwardFirewall(),
            guard=guard,
            admit=admit,
            dismiss=dismiss,
            node=node,
            now=now,
        )
    )


def restored_pool(state: State, now: Callable[[], float] = boot_time) -> Pool:
    """The host's pool as `state` remembers it."""
    pool = Pool(now)
    owned = (
        (known.key, known.pool, known.addresses) for known in state.attachments() if known.pool
    )
    pool.restore(owned, state.resting(), state.cursors())
    return pool
