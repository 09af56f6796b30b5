"""An attachment's life: ADD (whose steps are `addition`), CHECK, DEL, GC, and an agent's start.

DEL returns when the pod can neither send nor receive and its addresses rest. The kernel takes 20 ms
to remove a link; `Remover` does that later, for many links at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import threading
import time
from collections import Counter
from collections.abc import Collection, Generator, Mapping
from functools import partial
from typing import Any

import msgspec

from podwire.cni import answer
from podwire.cni.addition import Addition
from podwire.cni.collaborators import Collaborators, binding, follow_mac, guarded
from podwire.cni.config import parse
from podwire.cni.plan import LOOPBACK, key_of, make, role_of
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
from podwire.cni.result import Interface, Ip, Result, decode, encode, passed_on
from podwire.kernel import link, netns
from podwire.kernel.netlink import NetlinkSocket
from podwire.net import parse_mac
from podwire.wiring import Attachment, Key, loopback, tuning

log = logging.getLogger(__name__)

_NS_GET_NSTYPE, _CLONE_NEWNET = 0xB703, 0x40000000


class Lifecycle:
    """Attachments of one node. Methods may be called from several threads."""

    def __init__(self, collaborators: Collaborators) -> None:
        self._with = collaborators
        self._locks = _KeyLocks()
        self._remover = Remover(collaborators.state, collaborators.wirings, collaborators.guard)
        self._addition = Addition(collaborators, self._remover)
        self._own_netns = netns.inode()

    def stop(self) -> None:
        self._remover.stop()

    # --- ADD --------------------------------------------------------------------------------------

    def add(self, call: Call) -> dict[str, Any]:
        """The result in the call's version. Raises CniError and the collaborators' errors."""
        fd = self._pod_netns(call)
        plan = make(call, self._with.node())
        if plan.role == LOOPBACK:
            return self._loopback(fd, call)
        deadline = time.monotonic() + self._with.add_deadline_s
        with self._locks.hold(plan.draft.key), self._remover.paused():
            known = self._with.state.get(plan.draft.key)
            if known is not None:
                if known.netns == call.netns and not self._problems(known, fd):
                    return self._again(known, call)
                self._take_down(known, fd)  # of an earlier sandbox, or broken by somebody
            made = self._addition.make(plan, call, fd, deadline)
            return msgspec.json.decode(made.result)

    def _loopback(self, netns_fd: int, call: Call) -> dict[str, Any]:
        """Up; after another plugin, whose result it passes on, this is all that it says."""
        loopback.set_up(netns_fd, True)
        before = call.config.get("prevResult")
        if before is not None:
            return passed_on(before, call)
        ips = [Ip("127.0.0.1/8", interface=0), Ip("::1/128", interface=0)]
        lo = Interface(loopback.NAME, "00:00:00:00:00:00", sandbox=call.netns)
        return encode(Result(interfaces=[lo], ips=ips), call.version)

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
        if role_of(call) == LOOPBACK and call.netns_fd is not None and _is_netns(call.netns_fd):
            loopback.set_up(call.netns_fd, False)
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
        parts = [partial(self._with.firewall.remove, known.let_through)]
        if known.saved and netns_fd is not None:
            parts.append(partial(self._restore, known, netns_fd))
        if known.meter:
            parts.append(partial(self._with.meters.remove, known.meter))
        if known.host_ports:
            parts.append(partial(self._with.host_ports.remove, known.host_ports))
        if known.masquerade:
            parts.append(partial(self._with.masquerade.remove, known.addresses))
        if known.wiring:
            parts.append(partial(self._with.wiring(known).silence, known))
            parts.append(partial(self._with.dismiss, known))
        failures: list[Exception] = []
        for remove in parts:
            try:
                remove()
            except Exception as error:
                failures.append(error)
        for error in failures[1:]:
            log.error("a part of %s stays: %s", known.host_ifname or known.key.container, error)
        if failures:
            raise failures[0]
        self._with.state.remove(known, self._with.pool.rest_until())
        self._with.pool.release(known.key)
        if known.host_ifname:
            self._remover.put(known.wiring, known.host_ifname)

    def _restore(self, known: Attachment, netns_fd: int) -> None:
        """Give the interface back what tuning changed, if it is still there."""
        with NetlinkSocket(netns_fd=netns_fd) as pod:
            if link.find(pod, known.key.ifname) is None:
                return
        tuning.change(known.saved, known.key.ifname, netns_fd)
        if "mac" in known.saved:
            mac = parse_mac(str(known.saved["mac"]))
            follow_mac(self._with, known.key, mac)

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
            problems += answer.other_wishes(plan, parse(call), known)
        if problems:
            raise CniError(DIFFERS, "; ".join(problems))

    def _problems(self, known: Attachment, netns_fd: int) -> list[str]:
        problems: list[str] = []
        if known.wiring:
            problems += self._with.wiring(known).check(known, netns_fd)
        if known.host_ports:
            problems += self._with.host_ports.check(known.host_ports)
        if known.masquerade:
            problems += self._with.masquerade.check(known.addresses)
        if known.meter:
            problems += self._with.meters.check(known.meter)
        if known.sysctls:
            problems += tuning.check_sysctls(known.sysctls, netns_fd)
        if known.tuned:
            problems += tuning.check(known.tuned, known.key.ifname, netns_fd)
        if known.let_through:
            problems += self._with.firewall.check(known.let_through)
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
            self._with.guard.restore({k.host_ifname: binding(k) for k in kept if guarded(k)})

    # --- namespaces -------------------------------------------------------------------------------

    def _pod_netns(self, call: Call) -> int:
        fd = call.netns_fd
        if fd is None:
            raise CniError(UNKNOWN_CONTAINER, f"failed to open netns {call.netns!r}")
        if not _is_netns(fd):
            raise CniError(INVALID_NETNS, f"{call.netns} is no network namespace")
        if self._is_own(call):
            raise _own_netns()
        return fd

    def _is_own(self, call: Call) -> bool:
        own = call.netns_fd is not None and netns.inode(call.netns_fd) == self._own_netns
        return own and not call.override


def _is_netns(fd: int) -> bool:
    with contextlib.suppress(OSError):
        return fcntl.ioctl(fd, _NS_GET_NSTYPE) == _CLONE_NEWNET
    return False


def _own_netns() -> CniError:
    return CniError(INVALID_NETNS, "plugin's netns and netns from CNI_NETNS should not be the same")


def _valid_attachments(config: Mapping[str, Any]) -> Collection[tuple[str, str]] | None:
    listed = config.get("cni.dev/valid-attachments", config.get("cni.dev/attachments"))
    if listed is None:
        return None
    try:
        return {(each["containerID"], each["ifname"]) for each in listed}
    except (TypeError, KeyError):
        message = "cni.dev/valid-attachments is no list of containerID and ifname"
        raise CniError(INVALID_CONFIG, message) from None


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
