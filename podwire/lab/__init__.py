"""A cluster in network namespaces: topology, API server, controllers, pod runtime."""
