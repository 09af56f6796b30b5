"""Which data path `auto` takes on a machine that lacks what eBPF needs."""

from __future__ import annotations

import os
import shutil

import pytest

from podwire.agent.datapaths import DataPath
from podwire.agent.options import Options
from podwire.datapath.ebpf import programs
from podwire.errors import KernelError, Unsupported
from podwire.kernel.bpf import pins


def test_without_compiled_programs_nftables_serves_and_ebpf_says_what_is_missing(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(programs, "OBJECTS", tmp_path)
    options = Options(node_name="pwt", wiring="routed").checked()
    assert DataPath(options).name == "nftables"
    asked = Options(node_name="pwt", datapath="ebpf").checked()
    with pytest.raises(Unsupported, match="install clang, run make setup"):
        DataPath(asked)


@pytest.mark.skipif(bool(programs.missing()), reason="no eBPF data path here")
def test_programs_that_do_not_load_are_no_reason_to_stop_unless_others_work(tmp_path, monkeypatch):
    for path in programs.OBJECTS.glob("*.bpf.o"):
        shutil.copy(path, tmp_path)
    (tmp_path / "tcx.bpf.o").write_bytes(b"not an object")
    monkeypatch.setattr(programs, "OBJECTS", tmp_path)
    name = f"pwt-{os.getpid()}-refused"
    options = Options(node_name=name, wiring="routed").checked()
    folder = programs.Programs(name).folder
    try:
        assert DataPath(options).name == "nftables"
        folder.mkdir(parents=True, exist_ok=True)
        with pytest.raises(KernelError, match=r"tcx\.bpf\.o"):
            DataPath(options)
    finally:
        pins.remove(folder)
