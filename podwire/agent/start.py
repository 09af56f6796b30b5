"""How an agent starts: what may be wrong first, then two things at once.

The kernel verifies the data path's programs on one core while, on another, Python reads the rest
of the agent and the API's lists: either takes about as long.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import logging
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from podwire.agent.datapaths import DataPath
from podwire.agent.logs import event
from podwire.agent.options import Options
from podwire.errors import ConfigError, PodwireError
from podwire.kube import kubeconfig

if TYPE_CHECKING:
    from podwire.agent.main import Agent

log = logging.getLogger("podwire.agent")


def run(options: Options) -> int:
    """Run the agent to its end; the exit status. Raises ConfigError when another one runs."""
    # Objects and tables live long: without this, collector pauses double the time of a cold start.
    gc.set_threshold(100_000, 50, 100)
    # Whoever comes back from the kernel waits so long for a thread that computes; programs are
    # loaded in hundreds of calls.
    sys.setswitchinterval(0.0005)
    lock = _lock(options.run_dir)
    try:
        config = kubeconfig.load(options.kubeconfig or None)
        with ThreadPoolExecutor(1, "datapath") as aside:
            datapath = aside.submit(DataPath, options)
            try:
                agent = load_agent()
                gc.freeze()  # modules stay
                return asyncio.run(agent(options, config, datapath).run())
            except BaseException:
                datapath.add_done_callback(_abandon)
                raise
    except* (PodwireError, OSError) as group:
        for error in group.exceptions:
            event(log, logging.ERROR, "cannot go on", error=error)
    finally:
        os.close(lock)
    return 1


def load_agent() -> type[Agent]:
    """The rest of the agent. It is imported here, and not above, while the data path starts."""
    from podwire.agent.main import Agent

    return Agent


def _abandon(datapath: Future[DataPath]) -> None:
    """The agent cannot go on, perhaps never could."""
    if datapath.exception() is None:
        datapath.result().abandon()


def _lock(run_dir: Path) -> int:
    """One agent per run directory. Raises ConfigError when another one holds it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    fd = os.open(run_dir / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise ConfigError(f"another agent already runs in {run_dir}") from None
    return fd
