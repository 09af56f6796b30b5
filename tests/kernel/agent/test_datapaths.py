"""Which data path `auto` takes on a machine that lacks what eBPF needs."""

from __future__ import annotations

import os

import pytest

from podwire.agent.datapaths import DataPath
from podwire.agent.options import Options
from podwire.datapath.ebpf import programs
from podwire.errors import Unsupported

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def test_without_compiled_programs_nftables_serves_and_ebpf_says_what_is_missing(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(programs, "OBJECTS", tmp_path)
    options = Options(node_name="pwt", wiring="routed").checked()
    assert DataPath(options).name == "nftables"
    asked = Options(node_name="pwt", datapath="ebpf").checked()
    with pytest.raises(Unsupported, match="install clang, run make setup"):
        DataPath(asked)
