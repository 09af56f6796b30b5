"""`podwire lab status`: processes, nodes, pods, and what each agent says of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from podwire.errors import ApiError, PodwireError
from podwire.lab.readiness import Readiness
from podwire.lab.terminal import Terminal, table

if TYPE_CHECKING:
    from podwire.lab.cluster import Lab

Json: TypeAlias = dict[str, Any]

_ALWAYS = ("supervisor", "api", "runtime")


def overview(lab: Lab) -> Json:
    """Everything as JSON; `well` is true when nothing is amiss."""
    lab.reload()
    record = lab.record
    roles = [*_ALWAYS, *(f"agent-{name}" for name in record.nodes)]
    processes: Json = {}
    for role in roles:
        process = record.processes.get(role)
        alive = process is not None and process.alive
        processes[role] = {"pid": process.pid if process and alive else None}
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
            agents[name] = {"healthy": False, "reasons": [str(error)]}
    dead = [role for role, process in processes.items() if process["pid"] is None]
    healthy = all(agent.get("healthy", True) for agent in agents.values())
    return {
        "lab": lab.name,
        "well": not dead and not missing and healthy,
        "settings": record.settings,
        "processes": processes,
        "ready": counts,
        "missing": missing,
        "agents": agents,
    }


def render(found: Json, terminal: Terminal) -> list[str]:
    """Lines for people."""

    def mark(well: bool) -> str:
        return terminal.paint("ok", "green") if well else terminal.paint("!!", "red")

    settings = found["settings"]
    words = " ".join(f"{k}={settings[k]}" for k in ("wiring", "routing", "datapath"))
    lines = [f"{terminal.paint(found['lab'], 'bold')}  {found['ready']}  {words}", ""]
    rows = [
        [mark(p["pid"] is not None), role, f"pid {p['pid']}" if p["pid"] else "does not run"]
        for role, p in found["processes"].items()
    ]
    lines += table(rows)
    for node, agent in found["agents"].items():
        healthy = bool(agent.get("healthy", True))
        lines += [
            "",
            f"{mark(healthy)}  {terminal.paint(node, 'bold')}  {agent.get('summary', '')}",
        ]
        lines += [f"      {reason}" for reason in agent.get("reasons", ())]
        for part, status in agent.get("parts", {}).items():
            lines.append(f"    {part}: {_part(status)}")
            problems: Json = status.get("problems", {})
            lines += [f"      set aside: {what}: {why}" for what, why in problems.items()]
        for aside in agent.get("set_aside", ()):
            lines.append(f"      set aside: {aside['object']}: {aside['reason']}")
    if found["missing"]:
        lines += ["", terminal.paint("not ready:", "yellow")]
        lines += [f"  {line}" for line in found["missing"]]
    return lines


def _part(status: Json) -> str:
    kernel: Json = status.get("kernel") or {}
    counts = ", ".join(
        f"{name} {value}" for name, value in kernel.items() if isinstance(value, int | str)
    )
    error = f", {status['error']}" if status.get("error") else ""
    return f"revision {status.get('revision', 0)}{error}{', ' + counts if counts else ''}"
