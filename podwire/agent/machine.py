"""What the data paths need from the machine: set at start, watched, restored, shown.

A requirement that cannot be had stops the start: traffic would pass a data path by in silence.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
from collections.abc import Iterable
from pathlib import Path

from podwire.agent.logs import event
from podwire.agent.sysctls import Sysctls
from podwire.datapath import Requirement
from podwire.errors import KernelError, Unsupported
from podwire.kernel import sysctl

log = logging.getLogger("podwire.agent.machine")


class Machine:
    """The requirements of all parts that run, in the agent's own network namespace."""

    def __init__(self, requirements: Iterable[Requirement], sysctls: Sysctls | None = None) -> None:
        self._sysctls = sysctls or Sysctls()
        self._requirements = {r.sysctl: r for r in requirements if not _moot(r)}
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
        value = self._value(requirement)
        if value == requirement.value:
            return
        if value is None and requirement.module:
            _load_module(requirement.module)
        try:
            self._sysctls.set(requirement.sysctl, requirement.value)
        except KernelError as error:
            raise Unsupported(
                f"{requirement.sysctl} must be {requirement.value} ({requirement.why}): {error}"
                + (f"; modprobe {requirement.module} brings it" if requirement.module else "")
            ) from None


def _moot(requirement: Requirement) -> bool:
    """Whether it is about IPv6 on a kernel that was started without."""
    return requirement.sysctl.startswith("net.ipv6.") and not Path("/proc/sys/net/ipv6").exists()


def _load_module(name: str) -> None:
    """Try to; whether it helped is seen by what should be there then."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(["modprobe", "--quiet", name], timeout=30, check=False)
