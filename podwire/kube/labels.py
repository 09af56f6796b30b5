"""Well-known labels of API objects (https://kubernetes.io/docs/reference/labels-annotations-taints)."""

SERVICE_NAME = "kubernetes.io/service-name"
"""Of an EndpointSlice: the Service that it belongs to."""
HEADLESS = "service.kubernetes.io/headless"
"""Of an EndpointSlice: no proxy looks at it."""
ZONE = "topology.kubernetes.io/zone"
"""Of a Node."""
