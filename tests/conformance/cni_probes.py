"""Probes of CNI cases: real traffic from one namespace to another.

`{ns, ping}`, `{from, to}` (ping by name), and both with `port` and `protocol`, or `{ns, tcp: a:p}`;
`exit: nonzero` where it must not work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tests.conformance import cni_effects as effects
from tests.conformance.cni_live import Live
from tests.conformance.cni_node import Namespace

if TYPE_CHECKING:
    from tests.conformance.cni_run import Run

_KNOWN = {"ns", "ping", "from", "to", "exit", "port", "protocol", "family", "tcp", "udp",
    "note",
}  # fmt: skip


def probe(run: Run, wanted: dict[str, Any]) -> Iterator[str]:
    """One sentence when the traffic does not do what the case says."""
    strange = wanted.keys() - _KNOWN
    if strange:
        yield f"the runner does not know {sorted(strange)} of a probe"
        return
    names = _names(run)
    source = names[wanted.get("ns", wanted.get("from", "pod"))]
    port, protocol = wanted.get("port"), str(wanted.get("protocol", "tcp")).lower()
    text = str(wanted.get("ping", wanted.get("to", "")))
    for kind in ("tcp", "udp"):
        if kind in wanted:
            text, _, port = str(wanted[kind]).rpartition(":")
            text, protocol = text.strip("[]"), kind
    target = _address(run, text, "6" in str(wanted.get("family", "")))
    if target is None:
        yield f"the runner does not know where {text!r} is"
    elif port is None:
        within_s = 1 if wanted.get("exit", 0) else 5
        done = source.shell(f"ping -c 1 -i 0.2 -w {within_s} {target}")
        yield from _compare(wanted, done.returncode == 0)
    else:
        server = names.get(str(wanted.get("to")), _owner(run, target))
        seen = effects.seen_source(server, int(port), source, target, int(port), protocol)
        yield from _compare(wanted, seen is not None)


def _compare(wanted: dict[str, Any], works: bool) -> Iterator[str]:
    if works != (wanted.get("exit", 0) == 0):
        yield f"probe {wanted} {'works' if works else 'does not work'}"


def _names(run: Run) -> dict[str, Namespace]:
    pods = {name.replace("NETNS", "pod"): each for name, each in run.pods.items()}
    return {**pods, "pod1": run.pod, "host": run.host, "node": run.host, "outside": run.outside()}


def _address(run: Run, text: str, six: bool) -> str | None:
    """A pod by name, `gateway`, `host`, `outside`, or an address as it is."""
    ifname = run.environment.get("CNI_IFNAME", "eth0")
    if text.startswith("pod"):
        number = text.removeprefix("pod").removeprefix("1")
        pod = run.pods.get(f"NETNS{number}")
        return _first(Live(pod).addresses(ifname), six) if pod else None
    if text == "outside":
        return effects.OUTSIDE6 if six else effects.OUTSIDE4
    if text in ("gateway", "bridge"):
        ips = [ip for result in run.results.values() for ip in result.get("ips", [])]
        last = run.last_result().get("ips", ips)
        return next((each["gateway"] for each in last if (":" in each["gateway"]) == six), None)
    if text in ("host", "node"):
        run.outside()
        return effects.HOST6 if six else effects.HOST4
    return text or None


def _first(addresses: list[str], six: bool) -> str | None:
    plain = [each.partition("/")[0] for each in addresses]
    return next((each for each in plain if (":" in each) == six), None)


def _owner(run: Run, address: str) -> Namespace:
    for namespace in (*run.pods.values(), run.outside()):
        look = Live(namespace)
        for link in look.links:
            if address in [each.get("local") for each in link.get("addr_info", [])]:
                return namespace
    return run.host
