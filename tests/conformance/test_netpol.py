"""Every netpol case, ours and the given ones: on the evaluator, and with real packets."""

from __future__ import annotations

import pytest

from podwire.datapath.ebpf.programs import missing
from tests.conformance import OWN_CASES, SHARED_CASES
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
    results = list(run(folder, datapath))
    passed = [result for result in results if result.outcome == "passed"]
    # flow cases are prose (tests/kernel/test_policy_flows.py), demo cases need Cilium's kinds
    assert len(passed) > (0 if folder is FOLDERS[0] else len(results) * 0.9)
    assert [(r.case, r.detail) for r in results if r.outcome == "failed"] == []
