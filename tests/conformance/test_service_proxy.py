"""Every service-proxy case, ours and the given ones: on the evaluator, and with real packets."""

from __future__ import annotations

import pytest

from podwire.datapath.ebpf.layout import FRONTEND, FRONTEND_KEY
from podwire.datapath.ebpf.programs import missing
from tests.conformance import MEANING_CASES, OWN_CASES, SHARED_CASES, service_proxy
from tests.conformance.service_cases import Cluster
from tests.conformance.service_net import Net

FOLDERS = {
    "own": OWN_CASES / "service-proxy",
    "meaning": MEANING_CASES / "service-proxy",
    "given": SHARED_CASES / "service-proxy",
}
DATAPATHS = ("evaluator", "nftables", "iptables-nft", "iptables-legacy", "ebpf")
RUNS = [(name, datapath) for name in ("own", "given") for datapath in DATAPATHS]
RUNS.append(("meaning", "evaluator"))
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


def test_what_a_case_leaves_in_the_maps_fails_it() -> None:
    if missing():
        pytest.skip(f"this machine lacks {', '.join(missing())}")
    node = {"name": "node-a", "ips": ["192.168.50.10"]}
    with Net("ebpf") as net:
        net.begin(Cluster({"node": node}), "IPv4")
        assert net.end() == []
        net.begin(Cluster({"node": node}), "IPv4")
        frontends = net._parts._programs.growing["frontends"].map
        frontends.update(bytes(FRONTEND_KEY.size), bytes(FRONTEND.size))
        assert net.end() == ["left behind: 1 entries of map frontends"]
        net.begin(Cluster({"node": node}), "IPv4")
        assert net.end() == []
