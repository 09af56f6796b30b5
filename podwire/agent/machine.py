"""What the data paths need from the machine: set at start, watched, restored, shown.

A requirement that cannot be had stops the start: traffic would pass a data path by in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from podwire.agent.logs import event
from podwire.datapath import Requirement
from podwire.errors import KernelError, Unsupported
from podwire.kernel import sysctl

log = logging.getLogger("podwire.agent.machine")


class Machine:
    """The requirements of all parts that run, in the agent's own network namespace."""

    def __init__(self, requirements: Iterable[Requirement]) -> None:
        self._requirements = {r.sysctl: r for r in requirements}
        self.restored: dict[str, int] = {}  # sysctl → how often somebody changed it

    def require(self) -> None:
        """Set everything. Raises Unsupported naming the first that cannot be had."""
        for requirement in self._requirements.values():
            self._set(requirement)

    def watch(self) -> None:
        """Put back what somebody changed since; each is logged and counted."""
        for requirement in self._requirements.values():
            if self._value(requirement) != requirement.value:
                self.restored[requirement.sysctl] = self.restored.get(requirement.sysctl, 0) + 1
                event(log, logging.WARNING, "sysctl changed by somebody, restored",
                      sysctl=requirement.sysctl, value=requirement.value)  # fmt: skip
                self._set(requirement)

    def status(self) -> list[dict[str, object]]:
        return [
            {
                "sysctl": requirement.sysctl,
                "wanted": requirement.value,
                "value": self._value(requirement),
                "why": requirement.why,
                "restored": self.restored.get(requirement.sysctl, 0),
            }
            for requirement in self._requirements.values()
        ]

    @staticmethod
    def _value(requirement: Requirement) -> str | None:
        try:
            return sysctl.read(requirement.sysctl)
        except KernelError:
            return None

    def _set(self, requirement: Requirement) -> None:
        if self._value(requirement) == requirement.value:
            return
        try:
            sysctl.write({requirement.sysctl: requirement.value})
        except KernelError as error:
            raise Unsupported(
                f"{requirement.sysctl} must be {requirement.value} ({requirement.why}): {error}"
            ) from None
