"""The CNI server of the agent, and the spoof guard on the pods' ports."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from podwire.agent.logs import event
from podwire.agent.options import Options
from podwire.agent.watch import Watcher
from podwire.cni import assembly, conflist
from podwire.cni.plan import NodeConfig
from podwire.cni.server import CniServer, refuse
from podwire.datapath.nftables.spoof import SpoofGuard
from podwire.datapath.nftables.spoof_routed import RoutedSpoofGuard
from podwire.errors import KernelError
from podwire.ipam.state import State
from podwire.wiring import Attachment
from podwire.wiring.routed import RoutedWiring

if TYPE_CHECKING:
    from podwire.agent.vpc import VpcMode

log = logging.getLogger("podwire.agent.pods")

GUARD_PERIOD_S = 30.0


class Gate(Protocol):
    """Decides when a pod may be on the network (`agent.admission`)."""

    def restore(self, attachments: Sequence[Attachment]) -> None: ...
    def admit(self, attachment: Attachment) -> None: ...
    def dismiss(self, attachment: Attachment) -> None: ...


def _guard(wiring: str) -> SpoofGuard | RoutedSpoofGuard:
    guard = SpoofGuard() if wiring == "bridge" else RoutedSpoofGuard()
    guard.start()
    return guard


def _nobody_asks(_: Attachment) -> None:
    """Policies are not this agent's."""


class Pods:
    """The CNI server of one agent."""

    def __init__(
        self,
        options: Options,
        node: Callable[[], NodeConfig],
        gate: Gate | None,
        vpc: VpcMode | None = None,
    ) -> None:
        self._options = options
        self._vpc = vpc
        self._serving = False
        self._turn = threading.Lock()  # an agent may be told to stop while it starts
        self._state = State(options.state_dir / assembly.STATE_FILE)
        self.guard = _guard(options.wiring)
        if gate is not None:
            gate.restore(self._state.attachments())
        if vpc is not None:
            vpc.remember(self._state)
        self._routed: RoutedWiring | None = None
        if options.wiring != "bridge":
            self._routed = vpc.wiring if vpc is not None else RoutedWiring()
        lifecycle = assembly.assemble(
            self._state,
            node=node,
            pool=vpc.pool if vpc is not None else None,
            guard=self.guard if isinstance(self.guard, SpoofGuard) else None,
            wirings={"routed": self._routed} if self._routed is not None else None,
            admit=gate.admit if gate else _nobody_asks,
            dismiss=gate.dismiss if gate else _nobody_asks,
        )
        self.observe: Callable[[str, int, float], None] = lambda command, code, seconds: None
        self._server = CniServer(
            options.run_dir,
            lifecycle,
            self._ready,
            lambda command, code, seconds: self.observe(command, code, seconds),
        )

    def start(self) -> None:
        """Serve, and only then tell the runtime that there is a network."""
        with self._turn:
            self._server.start()
            self._serving = True
            conflist.write_conflist(self._options.cni_conf_dir)
        event(log, logging.INFO, "pods are served", conflist=self._options.cni_conf_dir)

    def stop(self) -> None:
        """The configuration stays: DELs are left for the next agent, ADDs are told to try again.

        Waits for calls under way, and they for the agent's loop: to be called in a thread.
        """
        with self._turn:
            self._serving = False
            if self._vpc is not None:
                self._vpc.pool.dismiss()
            self._server.stop()

    def close(self) -> None:
        """Nobody asks any more, also not who has which address."""
        self._state.close()

    def watchers(self) -> list[Watcher]:
        """Who puts back what somebody wipes of routed pods."""
        routed = self._routed
        if routed is None:
            return []
        return [Watcher("pods", routed.concerns, lambda: asyncio.to_thread(routed.restore))]

    async def guard_ports(self, repaired: Callable[[str, int], None]) -> None:
        """Check the spoof guard in the background, until cancelled."""
        while True:
            await asyncio.sleep(GUARD_PERIOD_S)
            try:
                repairs = await asyncio.to_thread(self.guard.verify)
            except KernelError as error:
                event(log, logging.ERROR, "the spoof guard cannot be checked", error=error)
                continue
            for repair in repairs:
                event(log, logging.WARNING, "repaired", part="spoof guard", what=repair)
                repaired("spoof", 1)

    def _ready(self) -> None:
        if not self._serving:
            raise refuse("the agent is starting")
