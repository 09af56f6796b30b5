"""SNAT and connection marks of VPC mode by iptables. Chains `PODWIRE-VPC-…`; `Part[VpcTable]`.

The same as `nftables.vpc`, which says why, but for one thing that iptables has no place for: after
a DNAT that took effect no further rule of the table nat is asked. So what a pod of a secondary ENI
sends to a Service whose endpoint lies beyond the VPC is not marked, and leaves by the wrong ENI.
And DNAT must be in the table nat too, before these rules: that of an nftables proxy comes too late.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from podwire.datapath import Requirement
from podwire.datapath.vpc import VpcTable, needs
from podwire.kernel.iptables import Flavour, Hook, Iptables, Rules, TableChange, detect_flavour
from podwire.net import format_address

_OURS = "PODWIRE-VPC-"
ARRIVING, LEAVING, SNAT = f"{_OURS}ARRIVING", f"{_OURS}LEAVING", f"{_OURS}SNAT"
_PORTS = {"prng": " --random-fully", "hashrandom": " --random", "none": ""}
_TABLES = ("mangle", "nat")


class VpcPart:
    """The rules in one network namespace (`netns_fd`; default: the caller's)."""

    requirements: Sequence[Requirement] = needs("")

    def __init__(self, netns_fd: int | None = None, flavour: Flavour | None = None) -> None:
        self._iptables = Iptables(4, flavour or detect_flavour(netns_fd), netns_fd)
        self._table: VpcTable | None = None
        self._made: dict[str, dict[str, Rules]] = {}

    def close(self) -> None:
        """Nothing is held."""

    def start(self) -> None:
        """What an earlier process left stays in force until the first `apply` replaces it."""

    def apply(self, table: VpcTable) -> None:
        """Write the chains anew, each table in one transaction."""
        if table == self._table:
            return
        self._write(table)
        self._table, self._made = table, self._held()
        self.requirements = needs(table.uplink)

    def flush(self) -> None:
        """Nothing waits."""

    def verify(self) -> list[str]:
        """Write the chains again when somebody changed them, and say so."""
        if self._table is None or self._held() == self._made:
            return []
        self._write(self._table)
        self._made = self._held()
        return [f"made the chains {ARRIVING}, {LEAVING} and {SNAT} again"]

    def cleanup(self) -> None:
        """Remove the chains, and the rules that lead to them."""
        for name in _TABLES:
            chains = self._iptables.save(name)
            ours = [chain for chain in chains if chain.startswith(_OURS)]
            change = TableChange({}, remove=ours, unhook=_hooks_in(chains))
            if ours:
                self._iptables.restore({name: change})
        self._table = None

    def status(self) -> dict[str, object]:
        return self._table.status() if self._table else {}

    def _write(self, table: VpcTable) -> None:
        for name, (chains, hooks) in rules(table).items():
            held = self._iptables.save(name)
            missing = [hook for hook in hooks if hook.rule not in held.get(hook.chain, ())]
            stale = [hook for hook in _hooks_in(held) if hook.rule not in {h.rule for h in hooks}]
            gone = [c for c in held if c.startswith(_OURS) and c not in chains]
            change = TableChange(chains, remove=gone, hooks=missing, unhook=stale)
            self._iptables.restore({name: change})

    def _held(self) -> dict[str, dict[str, Rules]]:
        """Our chains, and where they are called from."""
        found: dict[str, dict[str, Rules]] = {}
        for name in _TABLES:
            chains = self._iptables.save(name)
            ours = {c: rules for c, rules in chains.items() if c.startswith(_OURS)}
            found[name] = {**ours, "hooks": sorted(hook.rule for hook in _hooks_in(chains))}
        return found


def rules(table: VpcTable) -> dict[str, tuple[Mapping[str, Rules], list[Hook]]]:
    """By table of iptables: our chains, and the rules that lead to them."""
    mark = f"{table.mark:#x}"
    pods = f"-i {table.pod_links}+"
    restore = f"-j CONNMARK --restore-mark --nfmask {mark} --ctmask {mark}"
    arriving = [
        f"-i {table.uplink} -m conntrack --ctstate NEW -m addrtype --dst-type LOCAL"
        f" --limit-iface-in -j CONNMARK --set-xmark {mark}/{mark}",
        f"{pods} {restore}",
    ]
    mangle = {ARRIVING: arriving}, [Hook("PREROUTING", f"-j {ARRIVING}")]
    if not table.snat:
        return {"mangle": mangle, "nat": ({}, [])}
    near = [f"-d {prefix} -j RETURN" for prefix in table.not_translated]
    local = "-m addrtype --dst-type LOCAL -j RETURN"
    leaving = [local, *near, f"-j CONNMARK --set-xmark {mark}/{mark}", restore]
    primary = format_address(table.primary)
    snat = [
        f"-s {primary}/32 -j RETURN",
        *near,
        "-o lo -j RETURN",
        local,
        f"-j SNAT --to-source {primary}{_PORTS[table.random_ports]}",
    ]
    hooks = [
        Hook("PREROUTING", f"{pods} -j {LEAVING}", last=True),
        Hook("POSTROUTING", f"-j {SNAT}", last=True),
    ]
    return {"mangle": mangle, "nat": ({LEAVING: leaving, SNAT: snat}, hooks)}


def _hooks_in(chains: Mapping[str, Rules]) -> list[Hook]:
    return [
        Hook(chain, rule)
        for chain in ("PREROUTING", "POSTROUTING")
        for rule in chains.get(chain, ())
        if f"-j {_OURS}" in rule
    ]
