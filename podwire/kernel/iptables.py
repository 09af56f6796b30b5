"""x_tables through the tools that every program on the machine shares: restore and save.

Both flavours are served: `nft` (rules live in nf_tables) and `legacy` (in x_tables, guarded by the
lock that `-w` waits for). Rules are text as `iptables-save` prints it, without ``-A CHAIN``; what
is written in that form can be compared with what the kernel holds.

Sources: iptables-restore(8), iptables-save(8), xtables-nft(8);
include/uapi/linux/netfilter_ipv4/ip_tables.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from podwire.errors import KernelError, Unsupported
from podwire.kernel import netns
from podwire.kernel.nftables import IP, IP6, NfTables

Flavour: TypeAlias = Literal["nft", "legacy"]
FLAVOURS: tuple[Flavour, Flavour] = ("nft", "legacy")
ENVIRONMENT = "PODWIRE_IPTABLES"
"""Names the flavour; without it, it is detected."""

Rules: TypeAlias = Sequence[str]
Chains: TypeAlias = Mapping[str, Rules]

LOCK_WAIT_S = 10
"""How long the xtables lock is waited for, at most."""
_TIMEOUT_S = 120
# iptables-nft handles a transaction in time that grows with its square. Many chains are written in
# several, each chain after those that it jumps to.
_CHAINS_AT_ONCE = 300

_LEVELS = {4: socket.IPPROTO_IP, 6: socket.IPPROTO_IPV6}
_DOMAINS = {4: socket.AF_INET, 6: socket.AF_INET6}
_NF_FAMILIES = {4: IP, 6: IP6}
_TABLES = ("raw", "mangle", "nat", "filter", "security")
_HINT = "KUBE-IPTABLES-HINT"
_GET_INFO = 64
_INFO = struct.Struct("=32sI5I5III")  # name, valid hooks, entries, underflows, rules, bytes


_libc = ctypes.CDLL(None, use_errno=True)


class Hook(NamedTuple):
    """A rule of ours in a chain that belongs to everybody: it stands first, or is `last`."""

    chain: str
    rule: str
    last: bool = False


class TableChange(NamedTuple):
    """What to write to one table. Chains are made or emptied, then filled."""

    write: Chains
    remove: Iterable[str] = ()
    hooks: Iterable[Hook] = ()
    """To insert."""
    unhook: Iterable[Hook] = ()
    """To delete; they must be there."""


def detect_flavour(netns_fd: int | None = None) -> Flavour:
    """The flavour that others on this machine use.

    $PODWIRE_IPTABLES decides; then kubelet's hint (its chain KUBE-IPTABLES-HINT, which it makes for
    this purpose: KEP-3178); then what the machine's own `iptables` is. Raises Unsupported.
    """
    chosen = os.environ.get(ENVIRONMENT, "")
    if chosen and chosen not in FLAVOURS:
        raise Unsupported(f"{ENVIRONMENT} is {chosen!r}, not one of {', '.join(FLAVOURS)}")
    there: list[Flavour] = [f for f in FLAVOURS if chosen in ("", f) and installed(f)]
    if not there:
        name = f"iptables-{chosen}" if chosen else "iptables"
        raise Unsupported(f"the {name} program is missing: install the package iptables")
    if len(there) == 1:
        return there[0]
    for flavour in there:
        if _HINT in Iptables(4, flavour, netns_fd).save_all().get("mangle", {}):
            return flavour
    return "legacy" if "legacy" in netns.run(None, ["iptables", "--version"]).stdout else "nft"


def installed(flavour: Flavour) -> bool:
    """Whether the programs are there, for both families."""
    return all(shutil.which(f"{ip}tables-{flavour}-restore") for ip in ("ip", "ip6"))


def _legacy_tables(netns_fd: int | None = None) -> list[str]:
    """The tables that x_tables holds; to ask for one by name would make it."""
    names: set[str] = set()
    for path in ("ip_tables_names", "ip6_tables_names"):
        with contextlib.suppress(OSError):
            proc = Path("/proc/thread-self/net") / path
            names.update(netns.call(netns_fd, proc.read_text).split())
    return sorted(names)


class Iptables:
    """One family's tables of one network namespace (`netns_fd`; default: the caller's)."""

    def __init__(self, family: Literal[4, 6], flavour: Flavour, netns_fd: int | None = None):
        self.flavour: Flavour = flavour
        self.family: Literal[4, 6] = family
        self._netns_fd = netns_fd
        self._name = f"{'ip' if family == 4 else 'ip6'}tables-{flavour}"

    def __str__(self) -> str:
        return self._name

    def exists(self) -> bool:
        """Whether the programs are installed."""
        return shutil.which(f"{self._name}-restore") is not None

    def in_use(self) -> list[Iptables]:
        """This family in every flavour that somebody uses here."""
        used = {"nft": self._nft_tables(), "legacy": _legacy_tables(self._netns_fd)}
        every = (Iptables(self.family, flavour, self._netns_fd) for flavour in FLAVOURS)
        return [each for each in every if each.exists() and used[each.flavour]]

    def _nft_tables(self) -> list[str]:
        with NfTables(self._netns_fd) as nft:
            there = nft.tables(_NF_FAMILIES[self.family])
        return [name for name in there if name in _TABLES]

    def restore(self, changes: Mapping[str, TableChange]) -> None:
        """Write the changes by table, each in one transaction; rules of others stay.

        Only where iptables-nft gets more chains than it can handle at once are there several: then
        new chains come before those that jump to them. Raises KernelError with the refused line.
        """
        for table, change in changes.items():
            parts = [dict(change.write)]
            if self.flavour == "nft" and len(change.write) > 2 * _CHAINS_AT_ONCE:
                parts = list(_chunks(callees_first(change.write)))
            for part in parts[:-1]:
                self._restore(_script(table, TableChange(part)))
            self._restore(_script(table, change._replace(write=parts[-1])))

    def save(self, table: str) -> dict[str, tuple[str, ...]]:
        """Every chain of a table with its rules; empty if the table is not there."""
        return self._save("-t", table).get(table, {})

    def save_all(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """The same of all tables that are there; with iptables-nft it costs what one does."""
        return self._save()

    def _save(self, *arguments: str) -> dict[str, dict[str, tuple[str, ...]]]:
        done = self._run([f"{self._name}-save", *arguments])
        if done.returncode and "does not exist" not in done.stderr:
            raise KernelError(f"{self._name}-save failed: {done.stderr.strip()}")
        return parse_save(done.stdout)

    def fingerprint(self, table: str) -> int:
        """A number that is another one when rules came or went, and costs little to get."""
        if self.flavour == "nft":
            with NfTables(self._netns_fd) as nft:
                return hash(frozenset(nft.chain_uses(_NF_FAMILIES[self.family], table).items()))
        with netns.socket(
            self._netns_fd, _DOMAINS[self.family], socket.SOCK_RAW, socket.IPPROTO_RAW
        ) as sock:
            asked = struct.pack("32s", table.encode()).ljust(_INFO.size, b"\0")
            return hash(_get_info(sock, _LEVELS[self.family], asked))

    def counters(self, table: str, chain: str) -> list[int]:
        """Packets counted by each rule of a chain; empty if there is no such chain."""
        done = self._run([self._name, *self._wait, "-t", table, "-L", chain, "-v", "-x", "-n"])
        lines = done.stdout.splitlines()[2:] if done.returncode == 0 else []
        return [int(line.split()[0]) for line in lines if line.strip()]

    @property
    def _wait(self) -> list[str]:
        return ["-w", str(LOCK_WAIT_S)]

    def _restore(self, script: str) -> None:
        done = self._run([f"{self._name}-restore", "--noflush", *self._wait], script)
        if done.returncode:
            raise KernelError(_refusal(f"{self._name}-restore", script, done.stderr))

    def _run(self, command: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
        try:
            return netns.run(self._netns_fd, command, stdin=stdin, timeout_s=_TIMEOUT_S)
        except FileNotFoundError:
            raise Unsupported(
                f"the {command[0]} program is missing: install the package iptables"
            ) from None
        except subprocess.TimeoutExpired:
            raise KernelError(f"{command[0]} did not finish in {_TIMEOUT_S} s") from None


def _get_info(sock: socket.socket, level: int, asked: bytes) -> tuple[int, ...]:
    # socket.getsockopt cannot hand the kernel the table's name.
    buffer = ctypes.create_string_buffer(asked, _INFO.size)
    size = ctypes.c_uint32(_INFO.size)
    if _libc.getsockopt(sock.fileno(), level, _GET_INFO, buffer, ctypes.byref(size)):
        return ()
    return _INFO.unpack(buffer.raw)[1:]


def parse_save(text: str) -> dict[str, dict[str, tuple[str, ...]]]:
    """What `iptables-save` printed: table → chain → rules."""
    tables: dict[str, dict[str, list[str]]] = {}
    chains: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("*"):
            chains = tables[line[1:]] = {}
        elif line.startswith(":"):
            chains.setdefault(line[1:].split(" ", 1)[0], [])
        elif line.startswith("-A "):
            _, chain, rule = line.split(" ", 2)
            chains.setdefault(chain, []).append(rule)
    return {
        table: {name: tuple(rules) for name, rules in chains.items()}
        for table, chains in tables.items()
    }


def targets(rules: Rules) -> Iterator[str]:
    """Where the rules jump or go to: chains, and targets of the kernel."""
    for rule in rules:
        found = _TARGET.match(rule)
        if found:
            yield found[1]


_TARGET = re.compile(r"(?:.* )?-[jg] (\S+)")  # the last: a comment may hold another


def callees_first(chains: Chains) -> dict[str, Rules]:
    """The same chains, each after those of them that it jumps to."""
    out: dict[str, Rules] = {}

    def visit(name: str) -> None:
        if name in chains and name not in out:
            for callee in targets(chains[name]):
                visit(callee)
            out[name] = chains[name]

    for name in chains:
        visit(name)
    return out


def _chunks(chains: Chains) -> Iterator[dict[str, Rules]]:
    items = list(chains.items())
    for start in range(0, len(items), _CHAINS_AT_ONCE):
        yield dict(items[start : start + _CHAINS_AT_ONCE])


def _script(table: str, change: TableChange) -> str:
    removed = sorted(change.remove)
    out = [f"*{table}"]
    out += [f":{chain} - [0:0]" for chain in (*change.write, *removed)]
    out += [f"-D {hook.chain} {hook.rule}" for hook in change.unhook]
    out += [f"-A {chain} {rule}" for chain, rules in change.write.items() for rule in rules]
    out += [
        f"-A {hook.chain} {hook.rule}" if hook.last else f"-I {hook.chain} 1 {hook.rule}"
        for hook in change.hooks
    ]
    out += [f"-X {chain}" for chain in removed]
    return "\n".join([*out, "COMMIT", ""])


def _refusal(tool: str, script: str, stderr: str) -> str:
    """The tool's words with the line that they are about."""
    if "holding the xtables lock" in stderr:
        return f"{tool}: another program held the xtables lock for {LOCK_WAIT_S} s"
    said = " ".join(stderr.split())
    found = re.search(r"line:? (\d+)", said)
    lines = script.splitlines()
    if found and 0 < int(found[1]) <= len(lines):
        return f"{tool} refused {lines[int(found[1]) - 1]!r}: {said}"
    return f"{tool} refused the rules: {said}"
