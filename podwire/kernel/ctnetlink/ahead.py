"""Read a dump in a thread of its own, a few pieces ahead.

Half of a dump's time is the kernel's, without Python's lock: meanwhile the piece before is counted.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator

_PIECES = 16  # of 32 kB


def read_ahead(pieces: Iterator[bytes]) -> Generator[bytes]:
    """The same pieces. Ends its thread also when the reader stops early; raises what it raised."""
    ready: queue.SimpleQueue[bytes | Exception | None] = queue.SimpleQueue()
    room = threading.Semaphore(_PIECES)
    stopped = threading.Event()

    def read() -> None:
        try:
            for piece in pieces:
                room.acquire()
                if stopped.is_set():
                    return
                ready.put(piece)
            ready.put(None)
        except Exception as error:
            ready.put(error)

    thread = threading.Thread(target=read, name="conntrack-dump", daemon=True)
    thread.start()
    try:
        while True:
            piece = ready.get()
            if piece is None:
                return
            if isinstance(piece, Exception):
                raise piece
            room.release()
            yield piece
    finally:
        stopped.set()
        room.release()
        thread.join()
