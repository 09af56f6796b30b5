"""Every service-proxy case, ours and the given ones: on the evaluator, and with real packets."""

from __future__ import annotations

import pytest

from tests.conformance import OWN_CASES, SHARED_CASES, service_proxy

FOLDERS = (OWN_CASES / "service-proxy", SHARED_CASES / "service-proxy")


@pytest.mark.parametrize("datapath", ["evaluator", "nftables", "iptables-nft", "iptables-legacy"])
@pytest.mark.parametrize("folder", FOLDERS, ids=["own", "given"])
def test_cases(folder, datapath: str) -> None:
    if not folder.is_dir():
        pytest.skip(f"no cases at {folder}")
    results = list(service_proxy.run(folder, datapath))
    assert results
    assert [result for result in results if result.outcome != "passed"] == []
