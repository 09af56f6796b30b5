"""Takes a lab away, whatever state it is in: whole, half made, or killed at any point.

Everything is found by the lab's name, not by what somebody managed to write down: processes in its
cgroup (and those in `lab.json`, for machines without cgroup2), mounts below its directory. The
namespaces, with all links, routes, rules, sockets and BPF objects in them, end with their holders.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterable

from podwire.errors import ConfigError, PodwireError
from podwire.lab import cgroups, mounts
from podwire.lab.state import ROOT, LabDir, Process, this_process

PATIENCE_S = 10.0  # for processes that the kernel takes its time to tear down


def down(lab: LabDir) -> bool:
    """Remove everything of the lab; False when there was nothing.

    Raises PodwireError when a process survives SIGKILL (it hangs in the kernel).
    """
    cgroup = cgroups.of_lab(lab.name)
    if not lab.exists and (cgroup is None or not cgroup.is_dir()):
        return False
    deadline = time.monotonic() + PATIENCE_S
    recorded: list[Process] = []
    with contextlib.suppress(ConfigError, ValueError, KeyError, TypeError):
        recorded = [p for p in lab.read().processes.values() if p.alive]
    known = {*recorded, *map(this_process, cgroups.processes(cgroup))}
    cgroups.kill(cgroup)
    for process in recorded:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    _wait(known, deadline)
    while targets := mounts.below(lab.path):
        if not mounts.detach(targets[0]):  # and everything that is mounted below
            raise PodwireError(f"cannot unmount {targets[0]}")
    shutil.rmtree(lab.path, ignore_errors=True)
    if not cgroups.remove(cgroup, deadline):
        raise PodwireError(f"processes of lab {lab.name} do not end: {cgroups.processes(cgroup)}")
    for parent in (ROOT, ROOT.parent):  # when this was the last lab
        with contextlib.suppress(OSError):
            parent.rmdir()
    return True


def _wait(processes: Iterable[Process], deadline: float) -> None:
    """Wait until the processes are gone: a zombie holds nothing and counts as gone."""
    waiting = list(processes)
    while waiting := [p for p in waiting if p.alive]:
        if time.monotonic() > deadline:
            return
        time.sleep(0.002)
