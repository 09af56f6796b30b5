"""nf_tables tables of a constant structure whose elements are the pods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from podwire.errors import KernelError
from podwire.kernel.nftables import INET, Element, NfTables, Set, Transaction

Elements = tuple[Set, Sequence[Element]]


def make_table(nft: NfTables, table: str, script: str) -> None:
    """Run the script, which flushes the table's rules before it adds them: elements stay.

    A table whose sets another version typed otherwise is made anew. Raises KernelError.
    """
    try:
        nft.run(script)
    except KernelError:
        nft.run(f"add table inet {table}\ndelete table inet {table}\n{script}")


def settle(nft: NfTables, table: str, wanted: Iterable[Elements]) -> None:
    """Make all sets of the table hold these elements and no others. Raises KernelError."""
    names = [
        name for name in nft.sets(INET, table) if not name.startswith("__")
    ]  # else a rule's own
    held = {name: set(nft.elements(Set(INET, table, name))) for name in names}
    want: dict[str, set[Element]] = {name: set() for name in held}
    for target, elements in wanted:
        want[target.name].update(elements)
    transaction = Transaction()
    for name, elements in want.items():
        target = Set(INET, table, name)
        transaction.delete(target, held[name] - elements)
        transaction.add(target, elements - held[name])
    nft.commit(transaction)


def deletion(wanted: Iterable[Elements]) -> Transaction:
    transaction = Transaction()
    for target, elements in wanted:
        transaction.delete(target, elements)
    return transaction
