"""Every netpol case, ours and the given ones: on the evaluator, and with real packets.

With the overlay between the nodes, a sixth of the given ones and only on eBPF, which has identities
in it: `make conformance SUITE=netpol DATAPATH=ebpf ROUTING=vxlan` runs all.
"""

from __future__ import annotations

import pytest

from podwire.datapath.ebpf.programs import missing
from tests.conformance import MEANING_CASES, OWN_CASES, SHARED_CASES
from tests.conformance.netpol import run

FOLDERS = (OWN_CASES / "netpol", SHARED_CASES / "netpol")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("datapath", ["evaluator", "nftables", "iptables-nft", "ebpf"])
@pytest.mark.parametrize("folder", FOLDERS, ids=["own", "given"])
def test_cases(folder, datapath: str) -> None:
    if not folder.is_dir():
        pytest.skip(f"no cases at {folder}")
    if datapath == "ebpf" and missing():
        pytest.skip(f"this machine lacks {', '.join(missing())}")
    check(run(folder, datapath), some=folder is FOLDERS[0])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("datapath", ["nftables", "iptables-nft", "ebpf"])
@pytest.mark.parametrize("folder", FOLDERS, ids=["own", "given"])
def test_cases_over_vxlan(folder, datapath: str, tmp_path) -> None:
    if not folder.is_dir():
        pytest.skip(f"no cases at {folder}")
    if datapath == "ebpf" and missing():
        pytest.skip(f"this machine lacks {', '.join(missing())}")
    if folder is not FOLDERS[0]:
        if datapath != "ebpf":
            pytest.skip("`make conformance` runs these")
        for path in sorted(folder.rglob("*.yaml"))[::6]:
            (tmp_path / path.name).symlink_to(path)
        folder = tmp_path
    check(run(folder, datapath, "vxlan"), some=True)


def check(found, some: bool) -> None:
    results = list(found)
    passed = [result for result in results if result.outcome == "passed"]
    # flow cases are prose (tests/kernel/test_policy_flows.py), demo cases need Cilium's kinds
    assert len(passed) > (0 if some else len(results) * 0.9)
    assert [(r.case, r.detail) for r in results if r.outcome == "failed"] == []


def test_meaning() -> None:
    results = list(run(MEANING_CASES / "netpol", "evaluator"))
    assert results
    assert [result for result in results if result.outcome != "passed"] == []
