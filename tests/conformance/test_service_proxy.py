"""Every service-proxy case, ours and the given ones: on the evaluator, and with real packets."""

from __future__ import annotations

import pytest

from podwire.datapath.ebpf.programs import missing
from tests.conformance import OWN_CASES, SHARED_CASES, service_proxy

FOLDERS = (OWN_CASES / "service-proxy", SHARED_CASES / "service-proxy")


DATAPATHS = ("evaluator", "nftables", "iptables-nft", "iptables-legacy", "ebpf")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("datapath", DATAPATHS)
@pytest.mark.parametrize("folder", FOLDERS, ids=["own", "given"])
def test_cases(folder, datapath: str) -> None:
    if not folder.is_dir():
        pytest.skip(f"no cases at {folder}")
    if datapath == "ebpf" and missing():
        pytest.skip(f"this machine lacks {', '.join(missing())}")
    results = list(service_proxy.run(folder, datapath))
    assert results
    assert [result for result in results if result.outcome != "passed"] == []
