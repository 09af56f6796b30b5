"""Requirements of the machine, in a network namespace of their own."""

from __future__ import annotations

import os

import pytest

from podwire.agent.machine import Machine
from podwire.datapath import Requirement
from podwire.errors import Unsupported
from podwire.kernel import netns, sysctl

FORWARDING = Requirement("net.ipv4.ip_forward", "1", "the node routes")


@pytest.fixture
def fd():
    made = netns.create()
    yield made
    os.close(made)


def test_requirements_are_set_and_restored(fd):
    def play():
        machine = Machine([FORWARDING])
        machine.require()
        assert sysctl.read(FORWARDING.sysctl) == "1"
        sysctl.write({FORWARDING.sysctl: 0})
        machine.watch()
        assert sysctl.read(FORWARDING.sysctl) == "1"
        (row,) = machine.status()
        assert (row["value"], row["restored"]) == ("1", 1)

    netns.call(fd, play)


def test_what_cannot_be_had_stops_the_start_and_names_the_module(fd, tmp_path, monkeypatch):
    """modprobe is asked for the module; here one that notes it and brings nothing."""
    asked = tmp_path / "asked"
    (tmp_path / "modprobe").write_text(f'#!/bin/sh\necho "$@" >>{asked}\n')
    (tmp_path / "modprobe").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    wanted = Requirement("net.pwt.no_such", "1", "a test wants it", module="pwt_none")

    def play():
        with pytest.raises(Unsupported, match=r"a test wants it.*modprobe pwt_none brings it"):
            Machine([wanted]).require()

    netns.call(fd, play)
    assert asked.read_text() == "--quiet pwt_none\n"
