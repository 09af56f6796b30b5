"""Policy objects, Pods and Namespaces in, an immutable PolicyTable with its evaluator out. Pure."""
