"""Let pods through an iptables FORWARD chain whose policy is to drop (Docker sets it).

Chains, names and rules are those of the reference firewall plugin, so that an administrator's rules
in CNI-ADMIN go on working. A rule set of another table cannot take a packet back from iptables'
drop: this has to be iptables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from podwire.errors import KernelError, Unsupported
from podwire.kernel import netns
from podwire.net import Address, format_address

FORWARD, ADMIN = "CNI-FORWARD", "CNI-ADMIN"
_STAGE_1, _STAGE_2 = "CNI-ISOLATION-STAGE-1", "CNI-ISOLATION-STAGE-2"
_PROGRAMS = {4: "iptables", 16: "ip6tables"}


class ForwardFirewall:
    """The firewall of one namespace (`netns_fd`; default: the caller's)."""

    def __init__(self, netns_fd: int | None = None) -> None:
        self._netns_fd = netns_fd

    def add(
        self, addresses: Sequence[Address], policy: str, bridge: str, admin_chain: str = ADMIN
    ) -> None:
        """Accept to (what belongs to its connections) and from the addresses.

        `policy` "same-bridge" keeps pods of other bridges out, "isolated" all pods. Raises
        KernelError, Unsupported.
        """
        if policy != "open" and not bridge:
            raise KernelError(f"the ingressPolicy {policy} needs a bridge in prevResult")
        for address in addresses:
            size = len(address)
            self._ensure(size, admin_chain)
            if policy != "open":
                self._isolate(size, policy, bridge)
            for rule in _pod_rules(address):
                self._append(size, FORWARD, rule)

    def remove(self, addresses: Iterable[Address]) -> None:
        """What is gone already is no error."""
        for address in addresses:
            for rule in _pod_rules(address):
                self._run(len(address), ["-D", FORWARD, *rule], may_fail=True)

    def check(self, addresses: Iterable[Address]) -> list[str]:
        """How the live state differs, one sentence each."""
        return [
            f"{_PROGRAMS[len(address)]} lacks {FORWARD} {' '.join(rule)}"
            for address in addresses
            for rule in _pod_rules(address)
            if self._run(len(address), ["-C", FORWARD, *rule], may_fail=True)
        ]

    def _ensure(self, size: int, admin_chain: str) -> None:
        for chain in (FORWARD, admin_chain):
            self._run(size, ["-N", chain], may_fail=True)
        note = ["-m", "comment", "--comment", "CNI firewall plugin rules"]
        self._insert(size, "FORWARD", [*note, "-j", FORWARD])
        note[-1] = "CNI firewall plugin admin overrides"
        self._insert(size, FORWARD, [*note, "-j", admin_chain])

    def _isolate(self, size: int, policy: str, bridge: str) -> None:
        for chain in (_STAGE_1, _STAGE_2):
            self._run(size, ["-N", chain], may_fail=True)
        self._insert(size, "FORWARD", ["-j", _STAGE_1])
        if policy == "isolated":
            self._insert(size, _STAGE_1, ["-i", bridge, "-j", _STAGE_2])
        else:
            self._insert(size, _STAGE_1, ["-i", bridge, "!", "-o", bridge, "-j", _STAGE_2])
        self._append(size, _STAGE_1, ["-j", "RETURN"])
        self._insert(size, _STAGE_2, ["-o", bridge, "-j", "DROP"])
        self._append(size, _STAGE_2, ["-j", "RETURN"])

    def _insert(self, size: int, chain: str, rule: list[str]) -> None:
        if self._run(size, ["-C", chain, *rule], may_fail=True):
            self._run(size, ["-I", chain, *rule])

    def _append(self, size: int, chain: str, rule: list[str]) -> None:
        if self._run(size, ["-C", chain, *rule], may_fail=True):
            self._run(size, ["-A", chain, *rule])

    def _run(self, size: int, arguments: list[str], *, may_fail: bool = False) -> int:
        program = _PROGRAMS[size]
        try:
            done = netns.run(self._netns_fd, [program, "-w", "5", *arguments], timeout_s=15)
        except FileNotFoundError:
            raise Unsupported(f"the program {program} is missing: install iptables") from None
        if done.returncode and not may_fail:
            raise KernelError(f"{program} {' '.join(arguments)}: {done.stderr.strip()}")
        return done.returncode


def _pod_rules(address: Address) -> Iterable[list[str]]:
    text = f"{format_address(address)}/{len(address) * 8}"
    related = ["-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED"]
    yield ["-d", text, *related, "-j", "ACCEPT"]
    yield ["-s", text, "-j", "ACCEPT"]
