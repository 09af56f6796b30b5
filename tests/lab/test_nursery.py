"""What a lab has of the process that asks for it: the environment, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from podwire.lab.cluster import Lab
from podwire.lab.state import Process, this_process
from tests.lab.conftest import wait_for


def test_a_lab_holds_no_descriptor_of_its_caller(
    make_lab: Callable[..., Lab], tmp_path: Path
) -> None:
    with (tmp_path / "ours").open("w") as ours:
        os.set_inheritable(ours.fileno(), True)
        lab = make_lab(nodes=1)
        held = {
            os.readlink(fd)
            for process in lab.record.processes.values()
            for fd in Path(f"/proc/{process.pid}/fd").iterdir()
            if fd.is_symlink()
        }
    assert str(lab.dir.log("supervisor")) in held
    assert ours.name not in held


def test_the_nursery_ends_with_its_owner_however_that_ends() -> None:
    code = "from podwire.lab.nursery import Nursery; print(Nursery()._process.pid); input()"
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout
        nursery = this_process(int(owner.stdout.readline()))
        assert nursery.alive
        owner.kill()
    wait_for(lambda: not nursery.alive)


def test_a_process_says_what_it_is_doing_when_asked(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(nodes=1)
    runtime: Process = lab.process("runtime")
    os.kill(runtime.pid, signal.SIGUSR1)
    wait_for(lambda: "runtime_main" in lab.dir.last_words(50).get("runtime", ""))
    assert runtime.alive
