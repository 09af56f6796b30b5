"""Child processes of the supervisor: forked, not started anew.

Everything is imported once, before the first fork; a child is at work after a few milliseconds and
shares the pages of the modules with its siblings.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_libc = ctypes.CDLL(None, use_errno=True)


def fork(name: str, log: Path, main: Callable[[], None], close: tuple[int, ...] = ()) -> int:
    """The id of a child that runs `main` and exits; it is killed when this process dies.

    Its output goes to `log`; `close` are descriptors that it must not keep.
    """
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
        _libc.prctl(_PR_SET_NAME, name[:15].encode())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        for fd in close:
            with contextlib.suppress(OSError):
                os.close(fd)
        redirect(log)
        main()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def redirect(log: Path) -> None:
    """Standard input from /dev/null, standard output and error to the end of `log`."""
    nothing = os.open("/dev/null", os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(nothing)
    os.close(output)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def detach(keep: int) -> bool:
    """Fork twice, leaving the terminal and the session: True in the daemon, False in the caller.

    Of the caller's descriptors the daemon has the standard ones and `keep`: somebody may wait for
    the end of a pipe that the caller writes to.
    """
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return False
    os.setsid()
    if os.fork():
        os._exit(0)
    _let_go(keep)
    return True


def _let_go(keep: int) -> None:
    """Put /dev/null in the place of every inherited descriptor but `keep` and the standard ones.

    Closing them would free their numbers for descriptors of ours, and the objects that own them
    (the caller's sockets and files live on in this process) would close those when collected.
    """
    nothing = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in (keep, nothing):
            with contextlib.suppress(OSError):  # the listing's own is closed by now
                os.fstat(fd)
                os.dup2(nothing, fd, inheritable=False)
    os.close(nothing)
