"""What the parts of this data path share: each keeps one kind of table in maps of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from podwire.datapath import Requirement
from podwire.datapath.ebpf.connections import Connections
from podwire.datapath.ebpf.programs import Programs
from podwire.errors import KernelError

TableT = TypeVar("TableT")


class TablePart(ABC, Generic[TableT]):
    """A `datapath.Part` over `Programs`, which parts that work together are given the same of.

    Alone, it makes its own in `netns_fd` (default: the caller's namespace).
    """

    feature: str
    """What it is called by `Programs.enable`."""
    requirements: Sequence[Requirement] = ()

    def __init__(self, netns_fd: int | None = None, *, programs: Programs | None = None) -> None:
        self._programs = programs or Programs(netns_fd=netns_fd)
        self._shared = programs is not None
        self._table: TableT | None = None

    def close(self) -> None:
        """Let go of programs of its own; what is attached goes on."""
        if not self._shared:
            self._programs.close()

    @property
    def connections(self) -> Connections:
        """The connection table, for ageing and display."""
        return self._programs.connections

    def start(self) -> None:
        """Load and attach. Raises Unsupported or KernelError."""
        self._programs.enable(self.feature)

    def apply(self, table: TableT) -> None:
        """Make the maps hold `table`. Raises KernelError; the next table is then written whole."""
        with self._programs.lock:
            try:
                self._apply(table)
            except KernelError:
                self._start_over()
                raise

    def flush(self) -> None:
        """Nothing waits."""

    def verify(self) -> list[str]:
        """Compare the maps with the table, repair, and name each repair."""
        with self._programs.lock:
            return self._verify(self._table) if self._table is not None else []

    def cleanup(self) -> None:
        """Detach and remove everything of this node."""
        self._programs.cleanup()
        self._table = None

    @abstractmethod
    def _apply(self, table: TableT) -> None:
        """With the lock held; sets `_table`."""

    @abstractmethod
    def _verify(self, table: TableT) -> list[str]:
        """With the lock held."""

    def _start_over(self) -> None:
        """What the maps hold is not known any more."""
        self._table = None
