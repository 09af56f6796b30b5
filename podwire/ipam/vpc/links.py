"""What the manager needs of the host's network: ENIs as links, with addresses, tables and rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from podwire.errors import PodwireError
from podwire.net import Address, Prefix


@dataclass(frozen=True)
class EniLink:
    """How an ENI must look on the host. `table` is 254 (main) for the primary one."""

    mac: str
    address: Address
    subnet: Prefix
    table: int
    mtu: int
    primary: bool

    @property
    def gateway(self) -> Address:
        """The VPC router: the first address of the subnet (IPv4)."""
        return (int.from_bytes(self.subnet.address, "big") + 1).to_bytes(
            len(self.subnet.address), "big"
        )


class LinkMissing(PodwireError):
    """The device of an attached ENI did not appear in time."""


class HostNetwork(Protocol):
    """The host's side. `wiring.eni` implements it; tests have one without a kernel."""

    async def set_up(self, eni: EniLink, timeout_s: float) -> None:
        """Wait for the link with this MAC and give it addresses, routes and rules.

        Raises LinkMissing, KernelError.
        """
        ...

    async def tear_down(self, eni: EniLink) -> None:
        """Take away what `set_up` made; the link itself goes with the detach."""
        ...
