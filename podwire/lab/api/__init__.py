"""The lab's Kubernetes API server: what kubectl, our agent and our controllers use of it.

In: HTTP requests over TLS on loopback, manifests, bulk loads. Out: objects with the API's
semantics (versions, watches, finalizers, defaults, validation). Everything is kept in memory.
"""
