"""Node objects in, an immutable RouteTable (routes or VXLAN, masquerade ranges) out. Pure."""

from podwire.nodes.compiler import RouteCompiler
from podwire.nodes.table import (
    OVERLAY_DEVICE,
    OVERLAY_ID,
    Neighbour,
    NodeRoute,
    RouteTable,
    Tunnel,
    Way,
)

__all__ = [
    "OVERLAY_DEVICE",
    "OVERLAY_ID",
    "Neighbour",
    "NodeRoute",
    "RouteCompiler",
    "RouteTable",
    "Tunnel",
    "Way",
]
