"""Service and EndpointSlice objects in, an immutable ServiceTable with its evaluator out. Pure."""

from podwire.services.compiler import ServiceCompiler
from podwire.services.model import (
    Backend,
    DetectLocal,
    Family,
    Frontend,
    FrontendKind,
    HealthCheck,
    NodeFacts,
    NodePortScope,
    ProxyConfig,
    ServicePort,
    ServicePortName,
    Settings,
    backend,
    backend_address,
    backend_port,
    format_backend,
)
from podwire.services.resolve import Packet, Resolution
from podwire.services.table import ServiceDelta, ServiceTable

__all__ = [
    "Backend",
    "DetectLocal",
    "Family",
    "Frontend",
    "FrontendKind",
    "HealthCheck",
    "NodeFacts",
    "NodePortScope",
    "Packet",
    "ProxyConfig",
    "Resolution",
    "ServiceCompiler",
    "ServiceDelta",
    "ServicePort",
    "ServicePortName",
    "ServiceTable",
    "Settings",
    "backend",
    "backend_address",
    "backend_port",
    "format_backend",
]
