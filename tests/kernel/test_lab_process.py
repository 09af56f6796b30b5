"""A daemon made from a process that holds descriptors."""

import os
import socket

from podwire.lab import process


def test_a_daemons_descriptors_survive_the_callers_objects() -> None:
    read, write = os.pipe()
    mine = [socket.socket() for _ in range(8)]
    numbers = [each.fileno() for each in mine]
    if process.detach(write):
        verdict = b"?"
        try:
            own = [os.open("/dev/zero", os.O_RDONLY) for _ in range(16)]
            for each in mine:
                each.close()  # as a collection would
            verdict = b"+" if all(os.read(fd, 1) == b"\0" for fd in own) else b"-"
        except OSError as error:
            verdict = str(error).encode()
        finally:
            os.write(write, verdict)
            os._exit(0)
    os.close(write)
    assert os.read(read, 100) == b"+"
    os.close(read)
    assert [each.fileno() for each in mine] == numbers
