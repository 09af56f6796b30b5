"""Whatever the runtime sends: one clear error or one result, and after an error nothing is left."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from podwire.cni.protocol import VERSIONS
from podwire.kernel import link
from podwire.kernel.netlink import NetlinkSocket
from tests.conformance.cni_node import PLUGINS, Namespace, Node

CONFIG: dict[str, Any] = {
    "cniVersion": "1.1.0",
    "name": "net",
    "type": "podwire",
    "bridge": "br0",
    "isDefaultGateway": True,
    "hairpinMode": False,
    "promiscMode": False,
    "mtu": 1400,
    "vlan": 0,
    "ipMasq": False,
    "capabilities": {"portMappings": True},
    "runtimeConfig": {
        "mac": "02:00:00:00:00:05",
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
    },
    "args": {"cni": {"ips": ["10.5.0.9"]}},
    "ipam": {
        "type": "podwire-ipam",
        "ranges": [[{"subnet": "10.5.0.0/24", "rangeStart": "10.5.0.4", "gateway": "10.5.0.1"}]],
        "routes": [{"dst": "192.168.0.0/16", "gw": "10.5.0.254"}],
    },
}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.text(max_size=12)
    | st.sampled_from(["10.5.0.0/24", "10.5.0.300", "::/0", "fd00::/64", "0.0.0.0/0", "/", "1"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


class World:
    def __init__(self) -> None:
        self.node = Node()
        self.pod = Namespace("pod")
        self.node.start()
        self.sock = NetlinkSocket(netns_fd=self.node.namespace.fd)
        self.pod_sock = NetlinkSocket(netns_fd=self.pod.fd)

    def close(self) -> None:
        self.sock.close()
        self.pod_sock.close()
        self.node.close()
        self.pod.close()

    def environment(self, command: str) -> dict[str, str]:
        return {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": "c1",
            "CNI_NETNS": self.pod.path,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(self.node.plugins),
        }

    def call(self, environment: dict[str, str], text: str, plugin: str = "podwire") -> str:
        """ "" or the standard output of a success; judges every refusal."""
        done = self.node.call(plugin, environment, text)
        assert done.stderr == ""
        if done.returncode == 0:
            return done.stdout
        assert done.returncode == 1
        error = json.loads(done.stdout)
        assert error["cniVersion"] in VERSIONS
        assert isinstance(error["code"], int)
        assert error["code"] != 110, error  # that would be a bug of ours
        assert error["msg"]
        return ""

    def left(self) -> list[str]:
        names = [each.name for each in link.dump(self.sock) if each.kind != "bridge"]
        names += [f"pod {each.name}" for each in link.dump(self.pod_sock)]
        state = self.node.state()
        names += [str(known.key) for known in state.attachments()]
        state.close()
        return names

    def clean(self, plugin: str = "podwire") -> None:
        """DEL and a repeated ADD's precondition: the link is really gone."""
        plain = json.dumps({"cniVersion": "1.1.0", "name": "net", "type": plugin})
        assert self.call(self.environment("DEL"), plain, plugin) == ""
        self.call(
            self.environment("GC"),
            json.dumps({**json.loads(plain), "cni.dev/valid-attachments": []}),
            plugin,
        )


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    try:
        yield made
    finally:
        made.close()


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        for key, each in value.items():
            found += _paths(each, (*path, key))
    elif isinstance(value, list):
        for i, each in enumerate(value):
            found += _paths(each, (*path, i))
    return found


def _replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _replaced(copy[path[0]], path[1:], new)
    return copy


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere(world: World, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(_paths(CONFIG)))
    config = _replaced(CONFIG, path, data.draw(JSON))
    if not world.call(world.environment("ADD"), json.dumps(config)):
        assert world.left() == ["lo", "pod lo"]
    else:
        name = config["name"]
        for command, more in (("DEL", {}), ("GC", {"cni.dev/valid-attachments": []})):
            text = json.dumps({"cniVersion": "1.1.0", "name": name, "type": "podwire", **more})
            assert world.call(world.environment(command), text) == ""
        assert world.left() == ["lo", "pod lo"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plugin=st.sampled_from([f"podwire{suffix}" for suffix in PLUGINS]),
    command=st.sampled_from(["ADD", "DEL", "CHECK", "GC", "STATUS", "NOPE", ""]),
    key=st.sampled_from(["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH", "CNI_ARGS"]),
    value=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
    text=st.text(max_size=30) | JSON.map(json.dumps) | st.just(json.dumps(CONFIG)),
)
def test_any_environment_and_input(
    world: World, plugin: str, command: str, key: str, value: str, text: str
) -> None:
    environment = {**world.environment(command), key: value}
    if world.call(environment, text, plugin):
        world.clean(plugin)
    assert world.left() == ["lo", "pod lo"]


def test_an_exhausted_pool_says_so_and_recovers(world: World) -> None:
    config = {
        "cniVersion": "1.1.0",
        "name": "small",
        "type": "podwire",
        "ipam": {"ranges": [[{"subnet": "10.6.0.0/30"}]]},
    }
    plugin = "podwire-ipam"
    first = {**world.environment("ADD"), "CNI_CONTAINERID": "first"}
    second = {**first, "CNI_CONTAINERID": "second"}
    assert world.call(first, json.dumps(config), plugin)
    refused = world.node.call(plugin, second, json.dumps(config))
    error = json.loads(refused.stdout)
    assert error["code"] == 11
    assert "no IP addresses available in range set: 10.6.0.1-10.6.0.2" in error["msg"]
    assert world.call({**first, "CNI_COMMAND": "DEL"}, json.dumps(config), plugin) == ""
    refused = world.node.call(plugin, second, json.dumps(config))
    assert "1 rest after their last use" in json.loads(refused.stdout)["msg"]
    world.node.skip_time()
    assert world.call(second, json.dumps(config), plugin)
    assert world.call({**second, "CNI_COMMAND": "DEL"}, json.dumps(config), plugin) == ""


def test_strangers_and_noise_on_the_socket(world: World) -> None:
    mode = world.node.socket.stat().st_mode
    assert mode & 0o777 == 0o600
    head = b"PWCN\0\0\0\1"
    for noise in (b"", b"GET / HTTP/1.1\r\n\r\n", head + b"\xff" * 4, head + b"\0\0\0\5abc"):
        with socket.socket(socket.AF_UNIX) as stranger, contextlib.suppress(ConnectionResetError):
            stranger.settimeout(5)
            stranger.connect(str(world.node.socket))
            stranger.sendall(noise)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(64) == b""
    with socket.socket(socket.AF_UNIX) as other_time:
        other_time.settimeout(5)
        other_time.connect(str(world.node.socket))
        other_time.sendall(b"PWCN\0\0\0\x09\0\0\0\0")
        answer = other_time.recv(4096)
    assert answer.startswith(b"PWCN\0\0\0\1")
    assert json.loads(answer[16:])["code"] == 11
    assert "protocol 9" in json.loads(answer[16:])["msg"]
