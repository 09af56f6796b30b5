"""Tables whose rules never change: all that moves are elements."""

from __future__ import annotations

from podwire.errors import KernelError
from podwire.kernel.nftables import BRIDGE, INET, IP, IP6, NfTables

_FAMILIES = {IP: "ip", IP6: "ip6", INET: "inet", BRIDGE: "bridge"}


class FixedTable:
    """One table made by one script, which must add what is missing and flush the chains it fills.

    So making it again is one transaction that keeps the elements and interrupts nothing.
    """

    def __init__(self, nft: NfTables, family: int, name: str, script: str) -> None:
        self._nft = nft
        self._family = family
        self._name = name
        self._script = script
        self._rules: list[tuple[str, bytes]] = []

    def make(self) -> None:
        """Make the rules anew; sets keep their elements unless another version typed them."""
        try:
            self._nft.run(self._script)
        except KernelError:
            self._nft.run(self._removal + self._script)
        self._rules = self._nft.rules(self._family, self._name)

    def extend(self, script: str) -> None:
        """Run a script that adds rules to the table, or takes some away, on purpose."""
        self._nft.run(script)
        self._rules = self._nft.rules(self._family, self._name)

    def intact(self) -> bool:
        """Whether the kernel still holds the rules as they were made."""
        return self._nft.rules(self._family, self._name) == self._rules

    def remove(self) -> None:
        """Remove the table, if it is there."""
        self._nft.run(self._removal)

    @property
    def _removal(self) -> str:
        table = f"table {_FAMILIES[self._family]} {self._name}"
        return f"add {table}\ndelete {table}\n"
