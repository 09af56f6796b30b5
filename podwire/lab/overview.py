"""`podwire lab status`: processes, nodes, pods, and what each agent says of itself."""

from __future__ import annotations

from typing import Any, TypeAlias

from podwire.errors import ApiError, PodwireError
from podwire.lab.cluster import Lab
from podwire.lab.readiness import Readiness

Json: TypeAlias = dict[str, Any]

_ALWAYS = ("supervisor", "api", "runtime")


def overview(lab: Lab) -> Json:
    """Everything, for JSON: process ids by role (None: it does not run), agents' status by node.

    `well` is true when nothing is amiss.
    """
    lab.reload()
    record = lab.record
    roles = [*_ALWAYS, *(f"agent-{name}" for name in record.nodes)]
    processes: Json = {}
    for role in roles:
        process = record.processes.get(role)
        alive = process is not None and process.alive
        processes[role] = process.pid if process and alive else None
    missing: list[str] = []
    counts = "unknown: the API server does not answer"
    try:
        readiness = Readiness.of(lab)
        missing, counts = list(readiness.missing), str(readiness)
    except PodwireError as error:
        missing.append(str(error))
    agents: Json = {}
    for name in record.nodes:
        try:
            agents[name] = lab.agent(name, "/v1/status")
        except ApiError as error:
            agents[name] = {"error": f"node {name}: {error}", "healthy": False}
    dead = [role for role, pid in processes.items() if pid is None]
    healthy = all(agent["healthy"] for agent in agents.values())
    return {
        "lab": lab.name,
        "well": not dead and not missing and healthy,
        "settings": record.settings,
        "processes": processes,
        "ready": counts,
        "missing": missing,
        "agents": agents,
    }
