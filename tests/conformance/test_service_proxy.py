"""Every service-proxy case, ours and the given ones: on the evaluator, and with real packets."""

from __future__ import annotations

import pytest

from podwire.datapath.ebpf.programs import missing
from tests.conformance import OWN_CASES, SHARED_CASES, service_proxy

FOLDERS = {"own": OWN_CASES / "service-proxy", "given": SHARED_CASES / "service-proxy"}
DATAPATHS = ("evaluator", "nftables", "iptables-nft", "iptables-legacy", "ebpf")
RUNS = [(name, datapath) for name in FOLDERS for datapath in DATAPATHS]
RUNS.append(("own", "ebpf-maglev+xdp"))  # the given ones: python -m tests.conformance


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("name", "datapath"), RUNS)
def test_cases(name: str, datapath: str) -> None:
    folder = FOLDERS[name]
    if not folder.is_dir():
        pytest.skip(f"no cases at {folder}")
    if datapath.startswith("ebpf") and missing():
        pytest.skip(f"this machine lacks {', '.join(missing())}")
    results = list(service_proxy.run(folder, datapath))
    assert results
    assert [result for result in results if result.outcome != "passed"] == []
