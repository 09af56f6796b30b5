"""Tables in, kernel transactions out. One room per spelling, the same interface.

In: ServiceTable, PolicyTable or RouteTable. Out: one transaction with the difference.

Every room that serves Services has `podwire.datapath.<room>.services.ServicesPart`, made with
``ServicesPart(config: ProxyConfig, netns_fd: int | None = None)``; the conformance suite finds it
there, runs it in `netns_fd` with its requirements set, and closes it with `close()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

TableT = TypeVar("TableT", contravariant=True)


@dataclass(frozen=True)
class Requirement:
    """Something a data path needs from the machine, or traffic would pass it by in silence.

    `sysctl` is the dotted name inside the data path's own network namespace; `value` what it must
    hold; `why` one sentence for people; `module` the kernel module that brings it, if one does.
    """

    sysctl: str
    value: str
    why: str
    module: str = ""


class Part(Protocol[TableT]):
    """One part of a data path: Services, policies, or what leaves the node."""

    @property
    def requirements(self) -> Sequence[Requirement]:
        """What must hold on the machine; may change with `apply`."""
        ...

    def start(self) -> None:
        """Make the structure, or adopt what an earlier process left. Raises Unsupported."""
        ...

    def apply(self, table: TableT) -> None:
        """Make the kernel hold `table`: adds at once, deletes may wait for `flush`."""
        ...

    def flush(self) -> None:
        """Send the waiting deletes. Blocks for a grace period of the kernel (16 ms and more)."""
        ...

    def verify(self) -> list[str]:
        """Compare the kernel with the table, repair, and name each repair."""
        ...

    def cleanup(self) -> None:
        """Remove all of ours, and only ours. Works without `start`."""
        ...

    def status(self) -> dict[str, object]:
        """Counts and names for `podwire status`."""
        ...
