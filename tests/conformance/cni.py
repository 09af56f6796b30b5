"""The CNI suite: the real shim, the real server, real namespaces. See the cases' own README."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Iterable
from pathlib import Path

from podwire.errors import KernelError
from podwire.kernel import bridge, link
from podwire.kernel.netlink import NetlinkSocket
from tests.conformance import CaseResult
from tests.conformance.cni_actions import Skip
from tests.conformance.cni_case import Case, load
from tests.conformance.cni_node import Namespace
from tests.conformance.cni_routes import RouteRun, is_about_routes
from tests.conformance.cni_run import ENI_STYLE, Run
from tests.conformance.cni_vocabulary import unknown_words


def run(cases_dir: Path, datapath: str) -> Iterable[CaseResult]:
    """All cases of a folder, in order. The data path plays no part in CNI."""
    del datapath
    for path in sorted([*cases_dir.glob("*.yaml"), *cases_dir.glob("*.yml")]):
        yield run_file(path)


def run_file(path: Path) -> CaseResult:
    """One case on a node of its own."""
    try:
        case = load(path)
    except ValueError as error:
        return CaseResult(path.stem, "failed", str(error))
    strange = list(unknown_words(case.document))
    if strange:
        return CaseResult(case.id, "failed", "\n".join(strange))
    reason = _skipped(case)
    return CaseResult(case.id, "skipped", reason) if reason else _run(case)


def _run(case: Case) -> CaseResult:
    run = RouteRun(case) if is_about_routes(case) else Run(case)
    try:
        problems = run.execute()
    except Skip as skip:
        return CaseResult(case.id, "skipped", str(skip))
    except Exception as error:
        trace = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(trace.filename).name}:{trace.lineno}"
        return CaseResult(case.id, "failed", f"{error!r} at {where}")
    finally:
        run.close()
    return CaseResult(case.id, "failed" if problems else "passed", "\n".join(problems))


def _skipped(case: Case) -> str:
    """Why the case cannot be run here, or ""."""
    if case.document.get("reference_only"):
        return "only for the reference"
    if case.plugin == "any plugin that ends at 1.0.0":
        return "podwire does not end at 1.0.0"
    for need in case.document.get("requires") or []:
        if case.plugin.startswith(ENI_STYLE) and "daemon" in need:
            continue
        if is_about_routes(case) and ("node" in need or "daemon" in need):
            continue
        probe = _PROBES.get(need)
        if probe is None and shutil.which(need) is None:
            return f"needs {need}"
        if probe is not None and not probe():
            return f"this kernel lacks {need}"
    return ""


def _can_make(*requests: object) -> bool:
    namespace = Namespace("probe")
    try:
        with NetlinkSocket(netns_fd=namespace.fd) as sock:
            sock.run(*requests)  # type: ignore[arg-type]
            return True
    except KernelError:
        return False
    finally:
        namespace.close()


def _has_ifb() -> bool:
    return _can_make(link.add_ifb(link.End("ifb")))


def _has_vlans() -> bool:
    return _can_make(link.add_vlan(link.End("v"), 1, 7))


def _has_vlan_filtering() -> bool:
    namespace = Namespace("probe")
    try:
        with NetlinkSocket(netns_fd=namespace.fd) as sock:
            sock.run(link.add_bridge(link.End("br"), vlan_filtering=True))
            made = link.find(sock, "br")
            assert made is not None
            sock.run(bridge.add_vlan(made.index, bridge.PortVlan(7, 7), on_bridge=True))
            return True
    except KernelError:
        return False
    finally:
        namespace.close()


_PROBES = {
    "tbf": lambda: True,
    "ifb": _has_ifb,
    "8021q": _has_vlans,
    "bridge-vlan-filtering": _has_vlan_filtering,
    "daemon": lambda: True,
    "runtime library": lambda: True,
    "bridge netfilter for traffic inside one bridge": lambda: Path(
        "/proc/sys/net/bridge/bridge-nf-call-iptables"
    ).exists(),
}
