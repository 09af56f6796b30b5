"""Service and EndpointSlice objects in, an immutable ServiceTable with its evaluator out. Pure."""
