"""How the runtime executes plugins: a shell script stands in for each and writes down its calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from podwire.lab.runtime import cni

SCRIPT = """#!/bin/sh
name=${0##*/}
stdin=$(cat)
printf '%s\\t%s\\t%s\\t%s\\n' "$name" "$CNI_COMMAND" "$CNI_ARGS" "$stdin" >>"{log}"
[ -e "{log}.$name.$CNI_COMMAND" ] && { cat "{log}.$name.$CNI_COMMAND"; exit 1; }
[ "$CNI_COMMAND" = ADD ] && printf '{"cniVersion":"1.1.0","from":"%s"}' "$name"
exit 0
"""
SANDBOX = cni.Sandbox("c1", "/netns/x", "shop", "web", "u", {"portMappings": [1], "mac": "m"})
NETWORK = cni.NetworkList(
    "net", "1.1.0", [{"type": "first"}, {"type": "second", "capabilities": {"portMappings": True}}]
)


class World:
    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        for name in ("first", "second"):
            program = folder / name
            program.write_text(SCRIPT.replace("{log}", str(self.log)))
            program.chmod(0o755)
        self.plugins = cni.Plugins([folder], folder / "sock")

    def fail(self, name: str, command: str, answer: str) -> None:
        Path(f"{self.log}.{name}.{command}").write_text(answer)

    def calls(self) -> list[tuple[str, str, dict[str, object]]]:
        lines = [line.split("\t") for line in self.log.read_text().splitlines()]
        return [(name, command, json.loads(stdin)) for name, command, _, stdin in lines]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_add_chains_results_and_passes_wanted_capabilities(world: World) -> None:
    assert world.plugins.add(NETWORK, SANDBOX) == {"cniVersion": "1.1.0", "from": "second"}
    first, second = world.calls()
    assert first == ("first", "ADD", {"type": "first", "name": "net", "cniVersion": "1.1.0"})
    assert second[2]["prevResult"] == {"cniVersion": "1.1.0", "from": "first"}
    assert second[2]["runtimeConfig"] == {"portMappings": [1]}
    assert "capabilities" not in second[2]
    arguments = world.log.read_text().split("\t")[2]
    assert "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=c1" in arguments


def test_del_goes_backwards_with_the_result_of_add(world: World) -> None:
    world.plugins.add(NETWORK, SANDBOX)
    world.plugins.delete(NETWORK, SANDBOX)
    names = [(name, command) for name, command, _ in world.calls()[2:]]
    assert names == [("second", "DEL"), ("first", "DEL")]
    assert world.calls()[2][2]["prevResult"] == {"cniVersion": "1.1.0", "from": "second"}


def test_a_failed_add_is_undone_and_keeps_its_code(world: World) -> None:
    world.fail("second", "ADD", '{"code": 11, "msg": "try again", "details": "later"}')
    with pytest.raises(cni.CniError, match="second ADD: try again: later") as caught:
        world.plugins.add(NETWORK, SANDBOX)
    assert caught.value.code == cni.TRY_AGAIN_LATER
    assert [command for _, command, _ in world.calls()] == ["ADD", "ADD", "DEL", "DEL"]


def test_nonsense_missing_plugins_and_endless_ones_are_errors(world: World, tmp_path: Path) -> None:
    world.fail("first", "ADD", "Segmentation fault")
    with pytest.raises(cni.CniError, match="Segmentation fault") as caught:
        world.plugins.add(NETWORK, SANDBOX)
    assert caught.value.code == 999
    with pytest.raises(cni.CniError, match="no CNI plugin nobody"):
        world.plugins.status(cni.NetworkList("n", "1.1.0", [{"type": "nobody"}]))
    endless = tmp_path / "endless"
    endless.write_text("#!/bin/sh\nexec sleep 60\n")
    endless.chmod(0o755)
    with pytest.raises(cni.CniError, match="took longer"):
        cni.execute(endless, {"PATH": "/usr/bin:/bin"}, b"", timeout_s=0.05)


def test_configurations_are_found_by_name_and_broken_ones_passed_over(tmp_path: Path) -> None:
    assert cni.load(tmp_path) is None
    (tmp_path / "00-broken.conflist").write_text('{"name": ')
    good = {"name": "net", "cniVersion": "1.0.0", "plugins": [{"type": "first"}]}
    (tmp_path / "10-good.conflist").write_text(json.dumps(good))
    found = cni.load(tmp_path)
    assert found == cni.NetworkList("net", "1.0.0", [{"type": "first"}])
    assert found is not None
    cni.Plugins([tmp_path], tmp_path / "s").status(found)  # 1.0.0 knows no STATUS
