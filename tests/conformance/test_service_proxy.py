"""Every given service-proxy case: on the evaluator, and with real packets."""

from __future__ import annotations

import pytest

from tests.conformance import SHARED_CASES, service_proxy

FOLDER = SHARED_CASES / "service-proxy"


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the cases are not at {FOLDER}")
@pytest.mark.parametrize("datapath", ["evaluator", "nftables", "iptables-nft", "iptables-legacy"])
def test_every_given_case(datapath: str) -> None:
    results = list(service_proxy.run(FOLDER, datapath))
    assert results
    assert [result for result in results if result.outcome != "passed"] == []
