"""What is wrong with an agent's options is found before anything is done to the kernel."""

import logging
import os
import subprocess
import sys

import pytest

from podwire.agent import start
from podwire.agent.options import Options
from podwire.errors import ConfigError


@pytest.fixture
def options(tmp_path, monkeypatch):
    def touched(options: Options) -> None:
        raise AssertionError("the data path was started")

    monkeypatch.setattr(start, "DataPath", touched)
    return Options(run_dir=tmp_path, state_dir=tmp_path, kubeconfig=str(tmp_path / "none"))


def test_without_a_way_to_the_api_nothing_is_started(options, caplog):
    with caplog.at_level(logging.ERROR):
        assert start.run(options) == 1
    assert [record.getMessage() for record in caplog.records] == ["cannot go on"]
    assert str(options.kubeconfig) in str(caplog.records[0].error)


def test_a_second_agent_starts_nothing(options):
    held = start._lock(options.run_dir)
    try:
        with pytest.raises(ConfigError, match="another agent already runs in"):
            start.run(options)
    finally:
        os.close(held)


def test_what_a_data_path_does_not_need_is_imported_while_it_starts():
    """Half a second of modules, while the kernel verifies programs."""
    script = "import sys, podwire.cli.agent, podwire.agent.start; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    imported = set(done.stdout.split())
    assert "podwire.datapath.ebpf.programs" in imported
    late = {"aiohttp", "prometheus_client", "sqlite3", "podwire.agent.main", "podwire.kube.client"}
    assert not late & imported
