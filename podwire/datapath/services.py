"""What the spellings of Services in netfilter share."""

from __future__ import annotations

from podwire.datapath import Requirement
from podwire.services import ProxyConfig

_FORWARD = (
    Requirement("net.ipv4.ip_forward", "1", "backends are behind this node"),
    Requirement("net.ipv6.conf.all.forwarding", "1", "backends are behind this node"),
)
_LOCALNET = Requirement(
    "net.ipv4.conf.all.route_localnet", "1", "node ports are served on 127.0.0.1"
)


def needs(config: ProxyConfig) -> tuple[Requirement, ...]:
    """What the rules need of the machine."""
    return (*_FORWARD, _LOCALNET) if config.serves_loopback else _FORWARD
