"""nf_tables tables of a constant structure whose elements are the pods'."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence

from podwire.errors import KernelError
from podwire.kernel.nftables import INET, Element, NfTables, Set, Transaction

Elements = Iterable[tuple[Set, Sequence[Element]]]


class PodTable:
    """Table ``inet <name>`` of one namespace (`netns_fd`; default: the caller's).

    `script` adds the table, and flushes its rules before it adds them: elements stay.
    """

    def __init__(self, name: str, script: str, netns_fd: int | None = None) -> None:
        self._name = name
        self._script = script
        self._nft = NfTables(netns_fd)
        self._made = False

    def close(self) -> None:
        self._nft.close()

    def exists(self) -> bool:
        return self._name in self._nft.tables(INET)

    def make(self) -> None:
        """Make the table, unless this object has made it and it is there.

        One whose sets another version typed otherwise is made anew. Raises KernelError.
        """
        if self._made and self.exists():
            return
        try:
            self._nft.run(self._script)
        except KernelError:
            table = f"table inet {self._name}"
            self._nft.run(f"add {table}\ndelete {table}\n{self._script}")
        self._made = True

    def add(self, elements: Elements) -> None:
        """Raises KernelError (EEXIST: a key is there with other data); then nothing changed."""
        transaction = Transaction()
        for target, some in elements:
            transaction.add(target, some)
        self._nft.commit(transaction)

    def remove(self, elements: Elements) -> None:
        """What is gone already is no error. Raises KernelError."""
        wanted = list(elements)
        try:
            self._delete(wanted)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            self._delete([(target, self.held(target, some)) for target, some in wanted])

    def _delete(self, elements: Elements) -> None:
        transaction = Transaction()
        for target, some in elements:
            transaction.delete(target, some)
        self._nft.commit(transaction)

    def check(self, elements: Elements) -> list[str]:
        """How the live state differs from these elements being there, one sentence each."""
        if not self.exists():
            return [f"there is no nf_tables table inet {self._name}"]
        return [
            f"elements are missing in {target.name} of {self._name}"
            for target, some in elements
            if self.held(target, some) != some
        ]

    def held(self, target: Set, elements: Sequence[Element]) -> list[Element]:
        """Those of the elements that the kernel has, with the same data."""
        if not self.exists():
            return []
        present = {(each.key, each.data, each.end) for each in self._nft.elements(target)}
        return [each for each in elements if (each.key, each.data, each.end) in present]

    def settle(self, elements: Elements) -> None:
        """Make all sets of the table hold these elements and no others. Raises KernelError.

        Without elements there need be no table: it goes.
        """
        wanted = list(elements)
        if not wanted:
            self.cleanup()
            return
        self.make()
        names = [name for name in self._nft.sets(INET, self._name) if not _is_anonymous(name)]
        held = {name: set(self._nft.elements(Set(INET, self._name, name))) for name in names}
        want: dict[str, set[Element]] = {name: set() for name in held}
        for target, some in wanted:
            want[target.name].update(some)
        transaction = Transaction()
        for name, some in want.items():
            target = Set(INET, self._name, name)
            transaction.delete(target, held[name] - some)
            transaction.add(target, some - held[name])
        self._nft.commit(transaction)

    def cleanup(self) -> None:
        """Remove the table, if it is there."""
        self._made = False
        if self.exists():
            self._nft.run(f"delete table inet {self._name}")


def _is_anonymous(name: str) -> bool:
    """Whether a set is a rule's own: ``{ tcp, udp }``."""
    return name.startswith("__")
