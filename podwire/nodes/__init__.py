"""Node objects in, an immutable RouteTable (direct routes or VXLAN, masquerade ranges) out. Pure."""
