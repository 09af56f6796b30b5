"""nf_tables of one network namespace: scripts, transactions, listings."""

from __future__ import annotations

import errno as errnos
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence

from podwire.errors import KernelError, Unsupported
from podwire.kernel import netlink, netns
from podwire.kernel.netlink import NetlinkSocket, Request
from podwire.kernel.nftables import wire
from podwire.kernel.nftables.batch import SUBSYSTEM, BatchSocket, nfgenmsg
from podwire.kernel.nftables.expressions import rule_messages
from podwire.kernel.nftables.transaction import Element, Set, Transaction

_GETTABLE, _GETCHAIN, _GETRULE, _GETSET = 1, 4, 7, 10
_GETSETELEM, _GETGEN, _GETOBJ = 13, 16, 19
_OBJECT_COUNTER = 1


class _Commits:
    """How many commits this process has made in one network namespace."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0


_COMMITS: dict[int, _Commits] = {}
"""By the namespace's inode."""


class NfTables:
    """nf_tables of one network namespace (`netns_fd`; default: the caller's). Thread-safe."""

    def __init__(self, netns_fd: int | None = None) -> None:
        self._netns_fd = netns_fd
        self._netlink = NetlinkSocket(netlink.NETFILTER, netns_fd)
        self._batches = BatchSocket(netns_fd)
        self._lock = threading.Lock()  # of the batches
        self._commits = _COMMITS.setdefault(netns.inode(netns_fd), _Commits())

    def close(self) -> None:
        self._netlink.close()
        self._batches.close()

    def __enter__(self) -> NfTables:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, script: str, *, timeout_s: float = 30) -> None:
        """Apply `script` (one transaction) with the `nft` program.

        Raises KernelError with nft's own message, Unsupported where nft is not installed.
        """
        try:
            with self._commits.lock:
                done = netns.run(
                    self._netns_fd, ["nft", "-f", "-"], stdin=script, timeout_s=timeout_s
                )
                self._commits.count += not done.returncode
        except FileNotFoundError:
            raise Unsupported("the nft program is missing: install the package nftables") from None
        except subprocess.TimeoutExpired:
            raise KernelError(f"nft did not finish in {timeout_s} s") from None
        if done.returncode:
            raise KernelError(f"nft refused the script: {done.stderr.strip()}")

    def commit(self, transaction: Transaction) -> None:
        """Apply the transaction atomically. An empty one makes no system call.

        Raises KernelError that names the first refused element; nothing has changed then.
        """
        if not transaction:
            return
        messages = list(wire.messages(transaction))
        with self._commits.lock, self._lock:
            refused = self._batches.send(messages)
            if refused:
                raise messages[refused.index].refusal(refused)
            self._commits.count += 1

    def replace_rules(
        self, family: int, table: str, chains: Mapping[str, Sequence[Sequence[bytes]]]
    ) -> None:
        """Give the chains, which must be there, exactly these rules, in one transaction.

        A rule is its `expressions` in order. Raises KernelError; nothing has changed then.
        """
        messages = rule_messages(family, table, chains)
        with self._commits.lock, self._lock:
            refused = self._batches.send(messages)
            if refused:
                raise refused.error(f"cannot make the rules of {table}")
            self._commits.count += 1

    def strangers(self) -> int:
        """A number that stays the same while only this process commits in the namespace.

        It tells whether somebody else may have touched our tables, without listing them. (A script
        without effect makes it differ too: then there is one listing too many.)
        """
        with self._commits.lock:
            return (self.generation() - self._commits.count) & 0xFFFFFFFF

    def generation(self) -> int:
        """The rule set's generation: any commit in the namespace, by anyone, increases it."""
        what = "read the generation of nf_tables"
        (body,) = self._netlink.run(Request(SUBSYSTEM | _GETGEN, 0, nfgenmsg(0), what))
        return int.from_bytes(netlink.attributes(body, 4)[1], "big")

    def elements(self, target: Set) -> list[Element]:
        """All elements of a set or map, in no order. Raises KernelError (ENOENT: no such set)."""
        return list(map(wire.decode, self._listed(target)))

    def element_counters(self, target: Set) -> dict[bytes, tuple[int, int]]:
        """Packets and bytes by key, of a set or map whose elements count."""
        return dict(filter(None, map(wire.counter, self._listed(target))))

    def tables(self, family: int) -> list[str]:
        """Names of the tables of a family."""
        return [_name(body, 1) for body in self._dump(_GETTABLE, family) if body[0] == family]

    def chains(self, family: int, table: str) -> list[str]:
        """Names of the chains of a table; none if there is no such table."""
        bodies = self._dump(_GETCHAIN, family)
        return [_name(body, 3) for body in bodies if _name(body, 1) == table]

    def chain_uses(self, family: int, table: str) -> dict[str, int]:
        """How many rules each chain of a table holds, and jumps to it there are, in one number."""
        uses: dict[str, int] = {}
        for body in self._dump(_GETCHAIN, family):
            attributes = netlink.attributes(body, 4)
            if netlink.string(attributes[1]) == table:
                uses[netlink.string(attributes[3])] = int.from_bytes(attributes[6], "big")
        return uses

    def rules(self, family: int, table: str) -> list[tuple[str, bytes]]:
        """Every rule's chain and expressions, to compare: empty if there is no such table."""
        found: list[tuple[str, bytes]] = []
        for body in self._dump(_GETRULE, family, netlink.text(1, table)):
            attributes = netlink.attributes(body, 4)
            found.append((netlink.string(attributes[2]), attributes.get(4, b"")))
        return found

    def counters(self, family: int, table: str) -> dict[str, tuple[int, int]]:
        """Packets and bytes of a table's named counters; empty if there is no such table."""
        found: dict[str, tuple[int, int]] = {}
        for body in self._dump(_GETOBJ, family, netlink.text(1, table)):
            parts = netlink.attributes(body, 4)
            if int.from_bytes(parts[3], "big") == _OBJECT_COUNTER:
                numbers = netlink.attributes(parts[4])
                packets, octets = (int.from_bytes(numbers[n], "big") for n in (2, 1))
                found[netlink.string(parts[2])] = (packets, octets)
        return found

    def sets(self, family: int, table: str) -> list[str]:
        """Names of the sets and maps of a table; none if there is no such table."""
        try:
            bodies = self._dump(_GETSET, family, netlink.text(1, table))
        except KernelError as error:
            if error.errno == errnos.ENOENT:
                return []
            raise
        return [_name(body, 2) for body in bodies]

    def _listed(self, target: Set) -> Iterator[bytes]:
        for body in self._dump(_GETSETELEM, target.family, wire.of_set(target)):
            yield from wire.listed(body)

    def _dump(self, kind: int, family: int, attributes: bytes = b"") -> list[bytes]:
        return self._netlink.dump(SUBSYSTEM | kind, nfgenmsg(family) + attributes, "nf_tables")


def _name(body: bytes, attribute: int) -> str:
    return netlink.string(netlink.attributes(body, 4).get(attribute, b""))
