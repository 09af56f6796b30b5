"""IP sets through the `ipset` program: one child per change, elements as `ipset save` prints them.

Source: ipset(8).
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from typing import NamedTuple

from podwire.errors import KernelError, Unsupported
from podwire.kernel import netns
from podwire.net import Prefix, format_address

_TIMEOUT_S = 60
_MOST_ELEMENTS = 1 << 20


class IpSet(NamedTuple):
    """A set. `family` 0 is for types without one (bitmap:port); `timeout_s` None: for ever."""

    name: str
    type: str
    family: int = 0
    timeout_s: int | None = None

    @property
    def creation(self) -> str:
        """The line that makes it."""
        words = ["create", self.name, self.type]
        if self.family:
            words += ["family", "inet" if self.family == 4 else "inet6"]
        if self.type == "bitmap:port":
            words += ["range", "0-65535"]
        else:
            words += ["maxelem", str(_MOST_ELEMENTS)]
        if self.timeout_s is not None:
            # Full, it forgets a client rather than refuse one.
            words += ["timeout", str(self.timeout_s), "forceadd"]
        return " ".join(words)


class IpSets:
    """The sets of one network namespace (`netns_fd`; default: the caller's)."""

    def __init__(self, netns_fd: int | None = None) -> None:
        self._netns_fd = netns_fd

    def exist(self) -> bool:
        """Whether there can be any: the program is installed."""
        return shutil.which("ipset") is not None

    def restore(self, lines: Iterable[str]) -> None:
        """Run `create`, `add`, `del`, `destroy` lines in order; each is one change to the kernel.

        What is there already or not there any more is no error. Raises KernelError with the
        refused line; those before it have been carried out.
        """
        script = "".join(line + "\n" for line in lines)
        if not script:
            return
        done = self._run(["restore", "-exist"], script)
        if done.returncode:
            raise KernelError(f"ipset refused a line: {done.stderr.strip()}")

    def sizes(self, prefix: str) -> dict[str, int]:
        """Numbers of elements of the sets whose names begin so; costs little."""
        sizes: dict[str, int] = {}
        name = ""
        for line in self._ask(["list", "-t"]).splitlines():
            key, _, value = line.partition(": ")
            if key == "Name":
                name = value
            elif key == "Number of entries" and name.startswith(prefix):
                sizes[name] = int(value)
        return sizes

    def elements(self, prefix: str) -> dict[str, set[str]]:
        """Elements of the sets whose names begin so."""
        out: dict[str, set[str]] = {}
        for name, size in self.sizes(prefix).items():
            lines = self._ask(["save", name]).splitlines() if size else []
            out[name] = {line.split(" ", 2)[2] for line in lines if line.startswith("add")}
        return out

    def _ask(self, arguments: list[str]) -> str:
        done = self._run(arguments)
        if done.returncode:
            raise KernelError(f"ipset {' '.join(arguments)} failed: {done.stderr.strip()}")
        return done.stdout

    def _run(self, arguments: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = ["ipset", *arguments]
        try:
            return netns.run(self._netns_fd, command, stdin=stdin, timeout_s=_TIMEOUT_S)
        except FileNotFoundError:
            raise Unsupported("the ipset program is missing: install the package ipset") from None
        except subprocess.TimeoutExpired:
            raise KernelError(f"ipset did not finish in {_TIMEOUT_S} s") from None


def net_elements(prefix: Prefix) -> list[str]:
    """The prefix as a hash:net set holds and prints it: everything is two halves."""
    if not prefix.length:
        halves = (Prefix(bytes([first]) + prefix.address[1:], 1) for first in (0, 128))
        return [str(half) for half in halves]
    if prefix.length == prefix.bits:
        return [format_address(prefix.address)]
    return [str(prefix)]
