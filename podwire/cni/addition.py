"""ADD: a list of steps, each with its undo beside it.

When one fails, those before it are undone in reverse and nothing is left. The last step records the
attachment: what is recorded was answered or will be answered the same again, what is not recorded
does not exist.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import msgspec

from podwire.cni import answer
from podwire.cni.collaborators import Collaborators, binding, follow_mac, guarded
from podwire.cni.plan import CHAINED, IPAM, Plan
from podwire.cni.protocol import INVALID_CONFIG, TRY_AGAIN, Call, CniError
from podwire.cni.removal import Remover
from podwire.cni.result import Result, encode, passed_on
from podwire.errors import KernelError
from podwire.net import parse_mac
from podwire.wiring import Attachment, HostPorts, Meter, tuning
from podwire.wiring.meters import ifb_name

log = logging.getLogger(__name__)


@dataclass
class _Work:
    """One ADD under way."""

    plan: Plan
    netns_fd: int
    attachment: Attachment
    result: Result = field(default_factory=Result)
    changed: bool = False


class _Step(NamedTuple):
    do: Callable[[_Work], None]
    undo: Callable[[_Work], None] = lambda _: None


class Addition:
    """Makes attachments. Usable from several threads."""

    def __init__(self, collaborators: Collaborators, remover: Remover) -> None:
        self._with = collaborators
        self._remover = remover

    def make(self, plan: Plan, call: Call, netns_fd: int, deadline: float) -> Attachment:
        """The attachment, recorded. `deadline` is on time.monotonic.

        Raises CniError and the collaborators' errors; then nothing is left.
        """
        work = _Work(plan, netns_fd, plan.draft)
        self._run(self._steps(plan, call), work, deadline)
        return work.attachment

    def _run(self, steps: Sequence[_Step], work: _Work, deadline: float) -> None:
        done: list[_Step] = []
        try:
            for step in steps:
                if time.monotonic() > deadline:
                    limit = self._with.add_deadline_s
                    raise CniError(TRY_AGAIN, f"ADD did not finish within {limit:g} s")
                step.do(work)
                done.append(step)
        except BaseException:
            # The failed step itself undid what it did; its predecessors follow in reverse.
            for step in reversed(done):
                with _logged("undo a step of ADD"):
                    step.undo(work)
            raise

    def _steps(self, plan: Plan, call: Call) -> list[_Step]:
        parts, steps = plan.parts, list[_Step]()
        if plan.role == CHAINED:
            steps.append(_Step(self._adopt_previous))
        else:
            steps.append(_Step(self._take_addresses, self._give_back_addresses))
        if plan.draft.wiring:
            steps.append(_Step(self._attach, self._detach))
            steps.append(_Step(self._bind, self._unbind))
        if plan.draft.masquerade:
            steps.append(_Step(self._masquerade, self._end_masquerade))
        if parts.ports:
            steps.append(_Step(self._open_ports, self._close_ports))
        if any(parts.bandwidth):
            steps.append(_Step(self._limit, self._end_limit))
        if parts.sysctls or parts.tuning:
            steps.append(_Step(self._tune, self._untune))
        if parts.firewall:
            steps.append(_Step(self._let_through, self._end_let_through))
        if plan.draft.wiring:
            steps.append(_Step(self._admit, self._dismiss))
        steps.append(_Step(partial(_express, call=call)))
        steps.append(_Step(self._record))
        return steps

    def _adopt_previous(self, work: _Work) -> None:
        assert work.plan.previous is not None
        work.result = work.plan.previous

    def _take_addresses(self, work: _Work) -> None:
        plan, key = work.plan, work.attachment.key
        addresses = plan.fixed
        if plan.demand:
            addresses = self._with.pool.allocate(key, plan.demand)
        work.attachment = msgspec.structs.replace(
            answer.with_addresses(plan, work.attachment, addresses),
            pool=plan.demand.pool if plan.demand else "",
        )
        if plan.role == IPAM:
            work.result = answer.of_addresses(plan, work.attachment)

    def _give_back_addresses(self, work: _Work) -> None:
        self._with.pool.cancel(work.attachment.key)

    def _attach(self, work: _Work) -> None:
        wiring, draft = self._with.wiring(work.attachment), work.attachment
        self._remover.reclaim(wiring.host_ifname(draft))
        try:
            work.attachment = wiring.attach(draft, work.netns_fd)
        except KernelError as error:
            if error.errno != errno.EEXIST:
                raise
            self._remover.flush()  # perhaps it is a deleted pod's that waits for its removal
            work.attachment = wiring.attach(draft, work.netns_fd)
        work.result = answer.of_link(work.plan, work.attachment)
        work.changed = True

    def _detach(self, work: _Work) -> None:
        wiring = self._with.wiring(work.attachment)
        wiring.silence(work.attachment)
        wiring.purge([work.attachment.host_ifname])

    def _bind(self, work: _Work) -> None:
        made = work.attachment
        if self._with.guard and guarded(made):
            self._with.guard.bind(made.host_ifname, *binding(made))

    def _unbind(self, work: _Work) -> None:
        if self._with.guard:
            self._with.guard.unbind(work.attachment.host_ifname)
            self._with.guard.flush()

    def _masquerade(self, work: _Work) -> None:
        self._with.masquerade.add(work.attachment.addresses)

    def _end_masquerade(self, work: _Work) -> None:
        self._with.masquerade.remove(work.attachment.addresses)

    def _open_ports(self, work: _Work) -> None:
        parts = work.plan.parts
        targets = answer.port_targets(work.result)
        if not targets:
            raise CniError(INVALID_CONFIG, "host ports need an address of the pod")
        mappings = HostPorts(ports=parts.ports, targets=targets, masquerade=parts.masquerade)
        self._with.host_ports.add(mappings)
        work.attachment = msgspec.structs.replace(work.attachment, host_ports=mappings)

    def _close_ports(self, work: _Work) -> None:
        if work.attachment.host_ports:
            self._with.host_ports.remove(work.attachment.host_ports)

    def _limit(self, work: _Work) -> None:
        limits, key = work.plan.parts.bandwidth, work.attachment.key
        host_end = work.attachment.host_ifname or self._with.meters.host_end(
            key.ifname, work.netns_fd
        )
        meter = Meter(
            host_ifname=host_end, limits=limits, ifb=ifb_name(key) if limits.egress_rate else ""
        )
        ifb = self._with.meters.add(meter)
        if ifb:
            work.result = answer.with_interface(work.result, ifb)
            work.changed = True
        work.attachment = msgspec.structs.replace(work.attachment, meter=meter)

    def _end_limit(self, work: _Work) -> None:
        if work.attachment.meter:
            self._with.meters.remove(work.attachment.meter)

    def _tune(self, work: _Work) -> None:
        parts, ifname = work.plan.parts, work.attachment.key.ifname
        wanted = parts.tuning
        saved = tuning.change(wanted, ifname, work.netns_fd) if wanted else {}
        try:
            tuning.set_sysctls(parts.sysctls, work.netns_fd)
            self._follow(work, wanted)
        except KernelError:
            tuning.change(saved, ifname, work.netns_fd)
            raise
        work.attachment = msgspec.structs.replace(
            work.attachment, sysctls=parts.sysctls, tuned=wanted, saved=saved
        )
        changed = answer.with_changes(work.result, ifname, wanted)
        work.changed = work.changed or changed != work.result
        work.result = changed

    def _untune(self, work: _Work) -> None:
        saved = work.attachment.saved
        if saved:
            tuning.change(saved, work.attachment.key.ifname, work.netns_fd)
            self._follow(work, saved)

    def _follow(self, work: _Work, changed: Mapping[str, str | int]) -> None:
        if "mac" in changed:
            mac = parse_mac(str(changed["mac"]))
            follow_mac(self._with, work.attachment.key, mac)

    def _let_through(self, work: _Work) -> None:
        parts = work.plan.parts
        targets = tuple(each.address for each in answer.pod_addresses(work.result))
        bridge = answer.bridge_name(work.result)
        self._with.firewall.add(targets, parts.firewall, bridge, parts.admin_chain)
        work.attachment = msgspec.structs.replace(work.attachment, let_through=targets)

    def _end_let_through(self, work: _Work) -> None:
        self._with.firewall.remove(work.attachment.let_through)

    def _admit(self, work: _Work) -> None:
        self._with.admit(work.attachment)

    def _dismiss(self, work: _Work) -> None:
        self._with.dismiss(work.attachment)

    def _record(self, work: _Work) -> None:
        cursors = self._with.pool.cursors(work.attachment.pool) if work.plan.demand else []
        self._with.state.add(work.attachment, cursors, self._with.now())


def _express(work: _Work, call: Call) -> None:
    """The answer in the call's version; one that nothing changed goes back as it came."""
    before = None if work.changed else call.config.get("prevResult")
    document = encode(work.result, call.version) if before is None else passed_on(before, call)
    text = msgspec.json.encode(document).decode()
    work.attachment = msgspec.structs.replace(work.attachment, result=text)


@contextlib.contextmanager
def _logged(what: str) -> Generator[None, None, None]:
    try:
        yield
    except Exception:
        log.exception("cannot %s", what)
