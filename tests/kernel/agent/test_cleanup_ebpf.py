"""`podwire agent --cleanup` after eBPF: pins, links, maps and programs go, whatever options say."""

import ctypes
import os
import time
from pathlib import Path

from podwire.agent import carry, main
from podwire.agent.options import Options
from podwire.datapath.ebpf import pinned
from podwire.datapath.ebpf.programs import Programs
from podwire.errors import KernelError
from podwire.kernel import netns
from podwire.kernel.bpf import Map, Program, pins
from tests.kernel.ebpf_world import NEEDS_EBPF

pytestmark = NEEDS_EBPF
NEWNS, PRIVATE, DETACH = 0x20000, 0x44000, 2


def serve(name, netns_fd):
    """An agent's programs in force; ids of its programs and maps."""
    made = Programs(name, netns_fd)
    made.enable("services", "policy", "pods", "masquerade")
    ids = {link.info.program_id for link in made.attachments().values()}
    maps = {map.info.id for map in made.maps.values()}
    maps |= {growing.map.info.id for growing in made.growing.values()}
    made.close()
    assert ids
    return ids, maps


def is_there(kind, number):
    try:
        kind.by_id(number).close()
    except KernelError:
        return False
    return True


def wait_until_gone(ids, maps):
    """The kernel lets go of what nobody holds in the background."""
    deadline = time.monotonic() + 20
    while left := [n for kind, n in (*((Program, i) for i in ids), *((Map, i) for i in maps))
                   if is_there(kind, n)]:  # fmt: skip
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def cleanup(netns_fd, name):
    return netns.call(netns_fd, lambda: main.cleanup(Options(node_name=name)))


def test_nothing_remains_whatever_the_node_was_called(netns_fd, run_prefix):
    ids, maps = serve(f"{run_prefix}.example.org", netns_fd)
    netns.call(netns_fd, carry.Carry().begin)
    assert cleanup(netns_fd, run_prefix) == 0
    assert not pinned.folder(f"{run_prefix}.example.org").exists()
    wait_until_gone(ids, maps)
    assert cleanup(netns_fd, run_prefix) == 0  # again, with nothing there
    assert not pinned.folder(run_prefix).exists()


def test_other_nodes_of_the_machine_are_left_alone(netns_fd, run_prefix):
    other = netns.create()
    try:
        serve(f"{run_prefix}-other", other)
        assert cleanup(netns_fd, run_prefix) == 0
        assert pinned.link_paths(f"{run_prefix}-other")
        made = Programs(f"{run_prefix}-other", other)
        made.enable("services")
        made.cleanup()
    finally:
        os.close(other)


def test_pins_of_a_namespace_that_is_gone_go_too(netns_fd, run_prefix):
    other = netns.create()
    name = f"{run_prefix}-gone"
    serve(name, other)
    os.close(other)
    deadline = time.monotonic() + 20
    while not pinned.is_abandoned(name):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert cleanup(netns_fd, run_prefix) == 0
    assert not pinned.folder(name).exists()


def test_without_a_bpf_file_system_there_is_nothing_to_do(netns_fd, run_prefix):
    libc = ctypes.CDLL(None, use_errno=True)
    child = os.fork()
    if child == 0:
        try:
            assert libc.unshare(NEWNS) == 0
            assert libc.mount(b"none", b"/", None, PRIVATE, None) == 0
            assert libc.umount2(str(pins.ROOT).encode(), DETACH) == 0
            netns.enter(netns_fd)
            status = main.cleanup(Options(node_name=run_prefix))
            mounts = Path("/proc/self/mounts").read_text()
            os._exit(status or 2 * (f" {pins.ROOT} " in mounts))
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
