"""The kernel's log. Source: Documentation/ABI/testing/dev-kmsg."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from podwire.errors import KernelError

_RECORD_BYTES = 8192


class Message(NamedTuple):
    """One line; `at_s` is wall clock, seconds since the epoch."""

    at_s: float
    text: str


def read(containing: str) -> list[Message]:
    """The messages that are still in the ring buffer and hold this text, oldest first.

    Raises KernelError where the log may not be read.
    """
    booted_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    try:
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(f"cannot read /dev/kmsg: {error}", errno=error.errno or 0) from None
    found: list[Message] = []
    try:
        while True:
            try:
                record = os.read(fd, _RECORD_BYTES)
            except BlockingIOError:
                return found
            except BrokenPipeError:
                continue  # overwritten while we read: the next read goes on with the oldest
            message = parse(record.decode(errors="replace"), booted_s)
            if containing in message.text:
                found.append(message)
    finally:
        os.close(fd)


def parse(record: str, booted_s: float) -> Message:
    """``priority,sequence,microseconds,flags;text``, then lines that begin with a blank."""
    head, _, text = record.partition(";")
    return Message(booted_s + int(head.split(",")[2]) / 1e6, text.split("\n", 1)[0])
