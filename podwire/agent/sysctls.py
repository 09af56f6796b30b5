"""Kernel parameters that the agent sets, and what they were before: for `--cleanup`.

The record counts for one boot, since parameters begin anew with the next. One that somebody else
has changed since is his.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import msgspec

from podwire.agent.logs import event
from podwire.kernel import sysctl
from podwire.kube import snapshot

log = logging.getLogger("podwire.agent.sysctls")

FILE = "sysctls.json"


class _Change(msgspec.Struct):
    before: str
    ours: str


class _Record(msgspec.Struct):
    boot: str
    changes: dict[str, _Change]


class Sysctls:
    """The parameters of the caller's network namespace; without a folder nothing is recorded."""

    def __init__(self, state_dir: Path | None = None) -> None:
        self._path = state_dir / FILE if state_dir is not None else None

    def set(self, name: str, value: str) -> None:
        """Set a parameter that holds something else. Raises KernelError."""
        before = sysctl.read(name)
        if before == value:
            return
        if self._path is not None:
            record = _read(self._path)
            known = record.changes.get(name)
            record.changes[name] = _Change(known.before if known else before, value)
            try:
                snapshot.write(msgspec.json.encode(record), self._path)
            except OSError as error:  # it must be set all the same
                event(log, logging.WARNING, "what a sysctl was is not saved", error=error)
        sysctl.write({name: value})

    def cleanup(self) -> None:
        """Put back what is still as we set it, and forget the record. Raises KernelError."""
        if self._path is None:
            return
        for name, change in reversed(_read(self._path).changes.items()):
            if not Path(sysctl.path(name)).exists():
                continue  # its interface is gone
            if sysctl.read(name) == change.ours:
                sysctl.write({name: change.before})
        self._path.unlink(missing_ok=True)


def _read(path: Path) -> _Record:
    """Empty when there is none of this boot."""
    boot = sysctl.read("kernel.random.boot_id")
    with contextlib.suppress(OSError, msgspec.DecodeError):
        found = msgspec.json.decode(path.read_bytes(), type=_Record)
        if found.boot == boot:
            return found
    return _Record(boot, {})
