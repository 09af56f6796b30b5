"""The lab's cgroup2 directories: `podwire/<lab>/control` and `podwire/<lab>/<node>`.

They are the register of the lab's processes: the supervisor enters before it forks anything, so
whatever the lab started can be found and ended, even when nobody wrote down that it was started.
A node's directory is also what the agent on it may attach socket programs to.

Source: Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path


def root() -> Path | None:
    """Where cgroup2 is mounted, as a whole; None where it is not."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.startswith("cgroup2 ") and fields.split()[3] == "/":
            return Path(fields.split()[4])
    return None


def of_lab(name: str) -> Path | None:
    base = root()
    return None if base is None else base / "podwire" / name


def of_node(lab: str, node: str) -> Path | None:
    base = of_lab(lab)
    return None if base is None else base / node


def join(directory: Path | None, pid: int = 0) -> None:
    """Move a process (0: this one) into the directory, made if it is missing."""
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "cgroup.procs").write_text(str(pid))


def processes(directory: Path | None) -> list[int]:
    """The processes in the directory and below."""
    found: list[int] = []
    for path in _tree(directory):
        with contextlib.suppress(OSError):
            found += map(int, (path / "cgroup.procs").read_text().split())
    return found


def kill(directory: Path | None) -> None:
    """SIGKILL to everything in and below (cgroup.kill since Linux 5.14, else one by one)."""
    if directory is None or not directory.is_dir():
        return
    try:
        (directory / "cgroup.kill").write_text("1")
    except FileNotFoundError:
        for pid in processes(directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def remove(directory: Path | None, deadline: float) -> bool:
    """Remove the directory once its processes are gone; False when they are not by `deadline`.

    A killed process leaves its cgroup when it is torn down, some milliseconds after the signal.
    """
    while True:
        for path in reversed(_tree(directory)):
            with contextlib.suppress(OSError):
                path.rmdir()
        if directory is None or not directory.is_dir():
            with contextlib.suppress(OSError):  # the common parent, when this was the last lab
                if directory is not None:
                    directory.parent.rmdir()
            return True
        if time.monotonic() > deadline:
            return False
        kill(directory)
        time.sleep(0.005)


def _tree(directory: Path | None) -> list[Path]:
    if directory is None or not directory.is_dir():
        return []
    return [Path(folder) for folder, _, _ in os.walk(directory)]
