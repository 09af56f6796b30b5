"""The CNI protocol: requests, results, errors, the server, and the shim that runtimes execute."""
