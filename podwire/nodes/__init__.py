"""Node objects in, an immutable RouteTable (routes or VXLAN, masquerade ranges) out. Pure."""

from podwire.nodes.compiler import RouteCompiler
from podwire.nodes.table import (
    OVERLAY_DEVICES,
    OVERLAY_ID,
    OVERLAY_PORTS,
    Neighbour,
    NodeRoute,
    RouteTable,
    Tunnel,
    TunnelProtocol,
    Way,
)

__all__ = [
    "OVERLAY_DEVICES",
    "OVERLAY_ID",
    "OVERLAY_PORTS",
    "Neighbour",
    "NodeRoute",
    "RouteCompiler",
    "RouteTable",
    "Tunnel",
    "TunnelProtocol",
    "Way",
]
