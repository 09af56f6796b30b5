"""Node objects in, an immutable RouteTable (routes or VXLAN, masquerade ranges) out. Pure."""
