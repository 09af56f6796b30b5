import json
import subprocess

import pytest

from podwire.cli.main import main
from podwire.cni import conflist, installation
from podwire.errors import ConfigError


@pytest.fixture
def built(tmp_path, monkeypatch):
    program = tmp_path / "built"
    program.write_text('#!/bin/sh\n[ -e "$PODWIRE_CNI_SOCKET" ]\n')
    monkeypatch.setattr(installation, "BUILT", program)
    return program


def run(*words):
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return caught.value.code


def folders(tmp_path):
    return [f"--cni-bin-dir={tmp_path / 'bin'}", f"--cni-conf-dir={tmp_path / 'net.d'}"]


def test_the_configuration_waits_for_the_agent(tmp_path, built, capsys):
    assert run("install", *folders(tmp_path), f"--run-dir={tmp_path}") == 0
    assert "when it is ready" in capsys.readouterr().out
    assert not (tmp_path / "net.d").exists()
    (tmp_path / "cni.sock").touch()
    assert run("install", *folders(tmp_path), f"--run-dir={tmp_path}") == 0
    document = json.loads((tmp_path / "net.d" / conflist.NAME).read_text())
    assert document["plugins"][0]["type"] == "podwire"
    assert subprocess.run([tmp_path / "bin" / "podwire-portmap"], check=False).returncode == 1


def test_uninstall_takes_ours_and_nothing_else(tmp_path, built):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bridge").touch()
    installation.install(tmp_path / "bin")
    (tmp_path / "bin" / "podwire-ptp").unlink()
    (tmp_path / "bin" / "podwire-ptp").write_text("somebody else's")
    conflist.write_conflist(tmp_path / "net.d")
    (tmp_path / "net.d" / "99-other.conf").touch()
    for _ in range(2):
        assert run("uninstall", *folders(tmp_path)) == 0
    assert sorted(path.name for path in (tmp_path / "bin").iterdir()) == ["bridge", "podwire-ptp"]
    assert [path.name for path in (tmp_path / "net.d").iterdir()] == ["99-other.conf"]


def test_a_missing_build_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(installation, "BUILT", tmp_path / "none")
    with pytest.raises(ConfigError, match="make setup"):
        installation.install(tmp_path)


def test_an_equal_conflist_is_left_alone(tmp_path):
    path = conflist.write_conflist(tmp_path)
    before = path.stat().st_mtime_ns
    conflist.write_conflist(tmp_path)
    assert path.stat().st_mtime_ns == before
    conflist.remove_conflist(tmp_path)
    conflist.remove_conflist(tmp_path)
    assert list(tmp_path.iterdir()) == []
