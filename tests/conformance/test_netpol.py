"""Our own netpol cases, on the evaluator and with packets."""

from __future__ import annotations

import pytest

from tests.conformance import OWN_CASES
from tests.conformance.netpol import run


@pytest.mark.parametrize("datapath", ["evaluator", "nftables", "iptables-nft"])
def test_own_cases(datapath: str) -> None:
    results = list(run(OWN_CASES / "netpol", datapath))
    assert len(results) >= 5
    assert [(r.case, r.detail) for r in results if r.outcome != "passed"] == []
