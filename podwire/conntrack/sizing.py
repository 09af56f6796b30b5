"""How large the table should be: the rules of the field side by side, and what each costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

MAX = "net.netfilter.nf_conntrack_max"
BUCKETS = "net.netfilter.nf_conntrack_buckets"
SYSCTL_FILE = "/etc/sysctl.d/90-podwire-conntrack.conf"
MODPROBE_FILE = "/etc/modprobe.d/podwire-conntrack.conf"

BUCKET_BYTES = 8
PEAK_HEADROOM = 2
KUBE_PROXY_PER_CORE = 32768
KUBE_PROXY_MIN = 131072
KUBE_PROXY_MOST = 1048576
_KERNEL_MOST_BUCKETS = 262144
_STEP = 16384


@dataclass(frozen=True)
class Machine:
    """What the rules ask for."""

    memory_mb: int
    cores: int
    limit: int
    """nf_conntrack_max now."""
    buckets: int
    peak: int
    """The highest use that was seen, in all namespaces that share the limit taken one by one."""
    entry_bytes: int
    """Memory of one entry: the slab object, and extensions where they are used."""


class Rule(NamedTuple):
    """One rule's limit and the memory that a full table of that size takes."""

    name: str
    limit: int
    bytes: int
    why: str


class Advice(NamedTuple):
    """The rules, the limit advised, and the lines that set it."""

    rules: tuple[Rule, ...]
    limit: int
    buckets: int
    reason: str
    sysctls: dict[str, int]
    persistent: dict[str, str]
    """File name → its text."""


def kube_proxy_limit(
    cores: int, per_core: int = KUBE_PROXY_PER_CORE, least: int = KUBE_PROXY_MIN
) -> int:
    """max(min, maxPerCore × cores), as kube-proxy sets it; 0: leave it (kube-proxy, server.go)."""
    if per_core <= 0:
        return 0
    return max(least, min(per_core * cores, KUBE_PROXY_MOST))


def advise(machine: Machine) -> Advice:
    """The largest of the rules, since memory is what is cheapest here: at 16 entries a MB a full
    table takes less than one per cent. Never less than now.
    """
    rules = tuple(
        Rule(name, limit, memory_bytes(limit, machine), why)
        for name, limit, why in (
            ("now", machine.limit, f"{machine.buckets} buckets"),
            ("RAM in MB × 16", machine.memory_mb * 16, f"{machine.memory_mb} MB"),
            (
                "kube-proxy",
                kube_proxy_limit(machine.cores),
                f"max({KUBE_PROXY_MIN}, {KUBE_PROXY_PER_CORE} × {machine.cores} cores)",
            ),
            (
                "kernel default",
                min(machine.memory_mb * 64, _KERNEL_MOST_BUCKETS),
                f"RAM / 16 kB, at most {_KERNEL_MOST_BUCKETS}",
            ),
            (
                f"peak × {PEAK_HEADROOM}",
                machine.peak * PEAK_HEADROOM,
                f"{machine.peak} entries seen at most",
            ),
        )
    )
    largest = max(rules, key=lambda rule: rule.limit)
    limit = -(-largest.limit // _STEP) * _STEP if largest.name != "now" else machine.limit
    buckets = max(machine.buckets, limit)
    return Advice(
        rules, limit, buckets, _reason(largest, machine), {MAX: limit, BUCKETS: buckets},
        {
            SYSCTL_FILE: f"{MAX} = {limit}\n{BUCKETS} = {buckets}\n",
            # sysctl.d is read before the module is loaded on machines that load it late
            MODPROBE_FILE: f"options nf_conntrack hashsize={buckets}\n",
        },
    )  # fmt: skip


def memory_bytes(limit: int, machine: Machine) -> int:
    """What a full table of this limit takes, with a bucket for each entry."""
    return limit * machine.entry_bytes + max(limit, machine.buckets) * BUCKET_BYTES


def _reason(rule: Rule, machine: Machine) -> str:
    if rule.name == "now":
        return "the present limit is as large as every rule asks"
    return f"{rule.name} asks for the most; now {machine.limit}"
