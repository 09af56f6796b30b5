"""An attachment's life: ADD, CHECK, DEL and GC as steps over the collaborators.

ADD is a list of steps, each with its undo beside it; when one fails, those before it are undone in
reverse and nothing is left. The last step records the attachment: what is recorded was answered or
will be answered the same again, what is not recorded does not exist.

DEL returns when the pod can neither send nor receive and its addresses rest. The kernel takes 20 ms
to remove a link; `Remover` does that later, for many links at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import msgspec

from podwire.cni import answer
from podwire.cni.plan import CHAINED, IPAM, LOOPBACK, NodeConfig, Plan, key_of, make
from podwire.cni.protocol import (
    DIFFERS,
    INVALID_CONFIG,
    INVALID_NETNS,
    TRY_AGAIN,
    UNKNOWN_CONTAINER,
    Call,
    CniError,
)
from podwire.cni.removal import Remover
from podwire.cni.result import Interface, Ip, Result, decode, encode
from podwire.errors import KernelError
from podwire.ipam.pool import AddressPool, Cursor
from podwire.ipam.state import State
from podwire.kernel import link, netns
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import Address
from podwire.wiring import Attachment, HostPorts, Key, Meter, Wiring, loopback, tuning
from podwire.wiring.firewall import ForwardFirewall
from podwire.wiring.hostports import HostPortRules
from podwire.wiring.masquerade import MasqueradeRules
from podwire.wiring.meters import Meters, ifb_name

log = logging.getLogger(__name__)

ADD_DEADLINE_S = 30.0
_NS_GET_NSTYPE, _CLONE_NEWNET = 0xB703, 0x40000000


class SpoofGuard(Protocol):
    """Drops what leaves a pod with a source that is not its own."""

    def bind(self, host_ifname: str, mac: bytes, addresses: Sequence[Address]) -> None:
        """From now on the host end passes only these sources."""
        ...

    def unbind(self, host_ifname: str) -> None:
        """The link is gone or going."""
        ...

    def flush(self) -> None:
        """Make the kernel forget what was unbound; may wait for a grace period."""
        ...

    def restore(self, bindings: Mapping[str, tuple[bytes, Sequence[Address]]]) -> None:
        """Make the kernel hold these bindings and no others."""
        ...


class CursorPool(AddressPool, Protocol):
    """What of a pool is kept on disk besides the attachments."""

    def cursors(self, pool: str) -> list[Cursor]: ...
    def rest_until(self) -> float: ...


@dataclass(kw_only=True)
class Collaborators:
    """What the life of an attachment is made with.

    `admit` is called when the link is there and returns when the pod's policies are in place, or
    raises CniError; `dismiss` hears of every pod that was admitted and is gone (perhaps twice).
    `node` gives the defaults of the moment. `now` is the pool's clock.
    """

    state: State
    pool: CursorPool
    wirings: Mapping[str, Wiring]
    meters: Meters
    host_ports: HostPortRules
    masquerade: MasqueradeRules
    firewall: ForwardFirewall
    guard: SpoofGuard | None = None
    admit: Callable[[Attachment], None] = lambda _: None
    dismiss: Callable[[Attachment], None] = lambda _: None
    node: Callable[[], NodeConfig] = NodeConfig
    now: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
    add_deadline_s: float = ADD_DEADLINE_S


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


class Lifecycle:
    """Attachments of one node. Methods may be called from several threads."""

    def __init__(self, collaborators: Collaborators) -> None:
        self._with = collaborators
        self._locks = _KeyLocks()
        self._remover = Remover(collaborators.state, collaborators.wirings, collaborators.guard)
        self._own_netns = _inode_here()

    def stop(self) -> None:
        self._remover.stop()

    # --- ADD --------------------------------------------------------------------------------------

    def add(self, call: Call) -> dict[str, Any]:
        """The result in the call's version. Raises CniError and the collaborators' errors."""
        fd = self._pod_netns(call)
        plan = make(call, self._with.node())
        if plan.role == LOOPBACK:
            return encode(self._loopback(fd, call), call.version)
        deadline = time.monotonic() + self._with.add_deadline_s
        with self._locks.hold(plan.draft.key), self._remover.paused():
            known = self._with.state.get(plan.draft.key)
            if known is not None:
                if known.netns == call.netns and not self._problems(known, fd):
                    return self._again(known, call)
                self._take_down(known, fd)  # of an earlier sandbox, or broken by somebody
            work = _Work(plan, fd, plan.draft)
            self._run(self._steps(plan, call), work, deadline)
            return msgspec.json.decode(work.attachment.result)

    def _loopback(self, netns_fd: int, call: Call) -> Result:
        loopback.bring_up(netns_fd)
        ips = [Ip("127.0.0.1/8", interface=0), Ip("::1/128", interface=0)]
        lo = Interface(loopback.NAME, "00:00:00:00:00:00", sandbox=call.netns)
        return Result(interfaces=[lo], ips=ips)

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
        wiring, draft = self._wiring(work.attachment), work.attachment
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
        wiring = self._wiring(work.attachment)
        wiring.silence(work.attachment)
        wiring.purge([work.attachment.host_ifname])

    def _bind(self, work: _Work) -> None:
        made = work.attachment
        if self._with.guard and _guarded(made):
            self._with.guard.bind(made.host_ifname, *_binding(made))

    def _unbind(self, work: _Work) -> None:
        if self._with.guard:
            self._with.guard.unbind(work.attachment.host_ifname)

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
        if work.attachment.saved:
            tuning.change(work.attachment.saved, work.attachment.key.ifname, work.netns_fd)

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

    def _again(self, known: Attachment, call: Call) -> dict[str, Any]:
        """The answer to a repeated ADD."""
        stored = msgspec.json.decode(known.result)
        if stored["cniVersion"] == call.version:
            return stored
        return encode(decode(stored, call.version), call.version)

    # --- DEL and GC -------------------------------------------------------------------------------

    def delete(self, call: Call) -> None:
        """Raises KernelError when something of the attachment cannot be taken away."""
        if call.netns_fd is not None and self._is_own(call):
            raise _own_netns()
        with self._locks.hold(key_of(call)):
            known = self._with.state.get(key_of(call))
            if known is not None:
                self._take_down(known, call.netns_fd)

    def collect(self, call: Call) -> None:
        """GC: take away what the runtime does not list; without a list, nothing."""
        valid = _valid_attachments(call.config)
        if valid is None:
            return
        problems: list[str] = []
        for known in self._with.state.attachments():
            key = known.key
            if (key.network, key.plugin) != (call.network, key_of(call).plugin):
                continue
            if (key.container, key.ifname) in valid:
                continue
            with self._locks.hold(key):
                try:
                    self._take_down(known, None)
                except Exception as error:
                    problems.append(f"{key.container}/{key.ifname}: {error}")
        self._remover.flush()
        if problems:
            raise CniError(TRY_AGAIN, "GC could not remove everything", "; ".join(problems))

    def _take_down(self, known: Attachment, netns_fd: int | None) -> None:
        """All that ADD made, in reverse. Every part is tried; the record stays if one fails."""
        collaborators, failures = self._with, list[Exception]()
        parts = [partial(collaborators.firewall.remove, known.let_through)]
        if known.saved and netns_fd is not None:
            parts.append(partial(_restore, known, netns_fd))
        if known.meter:
            parts.append(partial(collaborators.meters.remove, known.meter))
        if known.host_ports:
            parts.append(partial(collaborators.host_ports.remove, known.host_ports))
        if known.masquerade:
            parts.append(partial(collaborators.masquerade.remove, known.addresses))
        if known.wiring:
            parts.append(partial(self._wiring(known).silence, known))
            parts.append(partial(collaborators.dismiss, known))
        for remove in parts:
            try:
                remove()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]
        rest_until = collaborators.pool.rest_until()
        collaborators.state.remove(known, rest_until)
        collaborators.pool.release(known.key)
        if known.host_ifname:
            self._remover.put(known.wiring, known.host_ifname)

    # --- CHECK ------------------------------------------------------------------------------------

    def check(self, call: Call) -> None:
        """Raises CniError 101 naming every difference, 7 without a prevResult."""
        fd = self._pod_netns(call)
        if call.config.get("prevResult") is None:
            raise CniError(INVALID_CONFIG, "Required prevResult missing")
        plan, key = make(call, self._with.node()), key_of(call)
        known = self._with.state.get(key)
        if plan.role == LOOPBACK:
            problems = loopback.check(fd)
        elif known is None:
            problems = [f"nothing is recorded for {key.container}/{key.ifname}"]
        else:
            before = decode(call.config["prevResult"], call.version)
            problems = answer.differences(before, known) + self._problems(known, fd)
        if problems:
            raise CniError(DIFFERS, "; ".join(problems))

    def _problems(self, known: Attachment, netns_fd: int) -> list[str]:
        collaborators, problems = self._with, list[str]()
        if known.wiring:
            problems += self._wiring(known).check(known, netns_fd)
        if known.host_ports:
            problems += collaborators.host_ports.check(known.host_ports)
        if known.masquerade:
            problems += collaborators.masquerade.check(known.addresses)
        if known.meter:
            problems += collaborators.meters.check(known.meter)
        if known.sysctls:
            problems += tuning.check_sysctls(known.sysctls, netns_fd)
        if known.tuned:
            problems += tuning.check(known.tuned, known.key.ifname, netns_fd)
        if known.let_through:
            problems += collaborators.firewall.check(known.let_through)
        return problems

    # --- start ------------------------------------------------------------------------------------

    def reconcile(self) -> None:
        """Bring the kernel to what is recorded: at the start, before anything is served."""
        state, wirings = self._with.state, self._with.wirings
        names = {known.host_ifname for known in state.attachments()}
        for wiring in wirings.values():
            wiring.purge(set(wiring.links()) - names)
        links = {name for wiring in wirings.values() for name in wiring.links()}
        for known in state.attachments():
            if known.host_ifname and known.host_ifname not in links:
                log.info("pod vanished", extra={"container": known.key.container})
                state.remove(known, self._with.pool.rest_until())
                self._with.pool.release(known.key)
                self._with.dismiss(known)
        kept = state.attachments()
        state.removed(state.removals())
        for name, wiring in wirings.items():
            wiring.reconcile([known for known in kept if known.wiring == name])
        self._with.meters.reconcile([known.meter for known in kept if known.meter])
        self._with.host_ports.reconcile([k.host_ports for k in kept if k.host_ports])
        self._with.masquerade.reconcile([a for k in kept if k.masquerade for a in k.addresses])
        if self._with.guard:
            self._with.guard.restore({k.host_ifname: _binding(k) for k in kept if _guarded(k)})

    # --- namespaces -------------------------------------------------------------------------------

    def _wiring(self, attachment: Attachment) -> Wiring:
        return self._with.wirings[attachment.wiring]

    def _pod_netns(self, call: Call) -> int:
        fd = call.netns_fd
        if fd is None:
            raise CniError(UNKNOWN_CONTAINER, f"failed to open netns {call.netns!r}")
        with contextlib.suppress(OSError):
            if fcntl.ioctl(fd, _NS_GET_NSTYPE) == _CLONE_NEWNET:
                if self._is_own(call):
                    raise _own_netns()
                return fd
        raise CniError(INVALID_NETNS, f"{call.netns} is no network namespace")

    def _is_own(self, call: Call) -> bool:
        own = call.netns_fd is not None and netns.inode(call.netns_fd) == self._own_netns
        return own and not call.override


def _restore(known: Attachment, netns_fd: int) -> None:
    """Give the interface back what tuning changed, if it is still there."""
    with NetlinkSocket(netns_fd=netns_fd) as pod:
        if link.find(pod, known.key.ifname) is None:
            return
    tuning.change(known.saved, known.key.ifname, netns_fd)


def _guarded(made: Attachment) -> bool:
    """Whether a pod's port is watched: on a bridge, and something is known to check."""
    return made.bridge is not None and bool(made.addresses or made.bridge.check_mac)


def _binding(made: Attachment) -> tuple[bytes, list[Address]]:
    return made.mac, [each.address for each in made.addresses]


def _inode_here() -> int:
    fd = netns.current()
    try:
        return netns.inode(fd)
    finally:
        os.close(fd)


def _own_netns() -> CniError:
    return CniError(INVALID_NETNS, "plugin's netns and netns from CNI_NETNS should not be the same")


def _express(work: _Work, call: Call) -> None:
    """The answer in the call's version; one that nothing changed goes back as it came."""
    before = call.config.get("prevResult")
    if before is not None and not work.changed and before.get("cniVersion") == call.version:
        document: dict[str, Any] = before
    else:
        document = encode(work.result, call.version)
    text = msgspec.json.encode(document).decode()
    work.attachment = msgspec.structs.replace(work.attachment, result=text)


def _valid_attachments(config: Mapping[str, Any]) -> Collection[tuple[str, str]] | None:
    listed = config.get("cni.dev/valid-attachments", config.get("cni.dev/attachments"))
    if listed is None:
        return None
    try:
        return {(each["containerID"], each["ifname"]) for each in listed}
    except (TypeError, KeyError):
        message = "cni.dev/valid-attachments is no list of containerID and ifname"
        raise CniError(INVALID_CONFIG, message) from None


@contextlib.contextmanager
def _logged(what: str) -> Generator[None, None, None]:
    try:
        yield
    except Exception:
        log.exception("cannot %s", what)


class _KeyLocks:
    """One lock for each key in use: calls about one interface follow each other."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[Key, threading.Lock] = {}
        self._users: Counter[Key] = Counter()

    @contextlib.contextmanager
    def hold(self, key: Key) -> Generator[None, None, None]:
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
            self._users[key] += 1
        try:
            with lock:
                yield
        finally:
            with self._guard:
                self._users[key] -= 1
                if not self._users[key]:
                    del self._users[key], self._locks[key]
