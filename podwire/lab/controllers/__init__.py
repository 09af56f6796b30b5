"""The small controllers that make a cluster live: workloads, scheduling, addresses, endpoints.

In: the API server's events, in its own process and loop. Out: objects written through its registry.
Each controller is a queue of keys and one synchronous `reconcile(key)` that looks at what is there
and does the next step; nothing polls.
"""

from __future__ import annotations

from podwire.lab.controllers.manager import ControllerConfig, ControllerManager

__all__ = ["ControllerConfig", "ControllerManager"]
