"""The parts of an agent over a `World`, and connections that talk all the time."""

import os
import socket
import threading
import time

from podwire.datapath.ebpf.pods import EbpfPods
from podwire.datapath.ebpf.programs import Programs
from podwire.datapath.ebpf.services import ServicesPart
from podwire.kernel import netns
from podwire.net import Protocol
from tests.kernel.ebpf_services import make_port, make_table
from tests.kernel.ebpf_world import POD

DIED = 9
"""The exit code of a process that `die_at` ended."""


def ports():
    return [
        make_port(f"v{family}", 80, [POD[1][family]], family=family, protocol=Protocol.TCP)
        for family in (4, 6)
    ]


def agent(world):
    """The parts as an agent starts them, over whatever is there."""
    programs = Programs(world.name, world.spaces["node"])
    services, pods = ServicesPart(programs=programs), EbpfPods(programs)
    pods.start()
    services.start()
    pods.replace(world.pod_link(n) for n in (1, 2))
    services.apply(make_table(ports()))
    return programs, services


class Talk(threading.Thread):
    """One connection that never stops talking; `failure` says what went wrong."""

    def __init__(self, world, space, target, pause=0):
        super().__init__(name=f"{space} to {target[0]}", daemon=True)
        self._pause = pause
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        self.socket = netns.socket(world.spaces[space], family, socket.SOCK_STREAM)
        self.socket.settimeout(5)
        self.socket.connect(target)
        self.stopped, self.turns, self.failure = threading.Event(), 0, None

    def run(self):
        try:
            while not self.stopped.is_set():
                message = self.turns.to_bytes(4, "big") * 8
                self.socket.sendall(message)
                answer = b""
                while len(answer) < len(message):
                    part = self.socket.recv(100)
                    assert part, "closed"
                    answer += part
                assert answer == message
                self.turns += 1
                if self._pause:
                    time.sleep(self._pause)
        except Exception as error:
            self.failure = repr(error)
        self.socket.close()


def die_at(owner, name, call, run, *, after=False):
    """Run `run` in a child that dies at the given call (from 1) of a function."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        body, count = getattr(owner, name), [0]

        def dies(*args, **kwargs):
            count[0] += 1
            if count[0] == call and not after:
                os._exit(DIED)
            done = body(*args, **kwargs)
            if count[0] == call:
                os._exit(DIED)
            return done

        setattr(owner, name, dies)
        run()
        os._exit(0)
    finally:
        os._exit(1)


def end(talks):
    """Stop them; none may have failed."""
    for talk in talks:
        talk.stopped.set()
    for talk in talks:
        talk.join(timeout=10)
    assert [f"{talk.name}: {talk.failure}" for talk in talks if talk.failure] == []
