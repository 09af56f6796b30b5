"""What ADD shall make, from configurations; every bad key is refused with code 7."""

import json

import pytest

from podwire.cni.plan import CHAINED, IPAM, LINK, LOOPBACK, NODE_POOL, PTP, NodeConfig, make
from podwire.cni.protocol import CniError, parse_call
from podwire.net import parse_address, parse_prefix
from podwire.wiring import Bandwidth, HostPort

NODE = NodeConfig(
    bridge="podwire0",
    pod_cidrs=(parse_prefix("10.1.0.0/24"), parse_prefix("fd00::/64")),
    mtu=1450,
    hairpin=True,
    default_gateway=True,
)
PREVIOUS = {
    "cniVersion": "1.1.0",
    "interfaces": [{"name": "eth0", "sandbox": "/x"}],
    "ips": [{"address": "10.1.2.2/24", "interface": 0}],
}


def plan(config=(), *, plugin="podwire", node=NODE, args=""):
    document = {"cniVersion": "1.1.0", "name": "net", "type": plugin, **dict(config)}
    environment = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "c1",
        "CNI_NETNS": "/x",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/bin",
        "CNI_ARGS": args,
    }
    return make(parse_call(plugin, environment, json.dumps(document).encode()), node)


def refusal(config=(), **options):
    with pytest.raises(CniError) as caught:
        plan(config, **options)
    return caught.value


def test_a_name_and_a_type_are_enough():
    made = plan(args="K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u")
    assert made.role == LINK
    assert str(made.draft.pod) == "shop/web-0"
    assert made.draft.mtu == 1450
    assert made.draft.bridge.name == "podwire0"
    assert made.draft.bridge.hairpin
    assert made.default_gateway
    assert made.demand.pool == NODE_POOL
    assert [str(ranges[0].subnet) for ranges in made.demand.sets] == ["10.1.0.0/24", "fd00::/64"]


def test_the_configuration_overrides_the_node():
    ipam = {"ranges": [[{"subnet": "10.9.0.0/24"}]]}
    flags = {"hairpinMode": False, "isDefaultGateway": False}
    made = plan({"bridge": "br9", "mtu": 1400, "ipam": ipam, **flags})
    assert made.draft.bridge.name == "br9"
    assert made.draft.mtu == 1400
    assert not made.draft.bridge.hairpin
    assert not made.default_gateway
    assert made.demand.pool == "net"


def test_an_empty_ipam_is_a_link_without_addresses():
    made = plan({"ipam": {}})
    assert made.demand is None
    assert made.fixed == ()
    assert not made.default_gateway


def test_ranges_come_from_somewhere():
    error = refusal({"ipam": {"type": "podwire-ipam"}}, node=NodeConfig())
    assert error.code == 7
    assert "no IP ranges" in error.message


@pytest.mark.parametrize(
    ("plugin", "role"),
    [("podwire-ptp", PTP), ("podwire-ipam", IPAM), ("podwire-loopback", LOOPBACK)],
)
def test_names_are_roles(plugin, role):
    made = plan({"ipam": {"ranges": [[{"subnet": "10.9.0.0/24"}]]}}, plugin=plugin)
    assert made.role == role
    assert made.draft.key.plugin == plugin


def test_with_a_prev_result_podwire_does_the_rest_of_a_chain():
    ports = [{"hostPort": 8080, "containerPort": 80, "protocol": "TCP", "hostIP": "::"}]
    made = plan(
        {
            "prevResult": PREVIOUS,
            "runtimeConfig": {"portMappings": ports},
            "sysctl": {"net/core/somaxconn": "500"},
            "ingressRate": 8000,
            "ingressBurst": 800,
        }
    )
    assert made.role == CHAINED
    assert made.parts.ports == (HostPort(8080, 80, 6, parse_address("::")),)
    assert made.parts.sysctls == {"net.core.somaxconn": "500"}
    assert made.parts.bandwidth == Bandwidth(8000, 800)


def test_requests_come_from_everywhere():
    made = plan(
        {
            "ipam": {"ranges": [[{"subnet": "10.9.0.0/24"}], [{"subnet": "fd00:9::/64"}]]},
            "args": {"cni": {"ips": ["fd00:9::5"], "mac": "02:00:00:00:00:01"}},
            "runtimeConfig": {"ips": ["10.9.0.7/16"], "mac": "02-00-00-00-00-02"},
        },
        args="MAC=02:00:00:00:00:03",
    )
    assert set(made.demand.requested) == {parse_address("10.9.0.7"), parse_address("fd00:9::5")}
    assert made.draft.mac == bytes.fromhex("020000000002")


def test_static_addresses_with_arguments():
    made = plan(
        {"ipam": {"type": "static"}},
        plugin="podwire-ipam",
        args="IP=10.10.0.1/24,fd00::1/64;GATEWAY=10.10.0.254",
    )
    assert [(each.length, each.gateway) for each in made.fixed] == [
        (24, parse_address("10.10.0.254")),
        (64, b""),
    ]


@pytest.mark.parametrize(
    "config",
    [
        {"mtu": -1},
        {"mtu": "big"},
        {"vlan": 4095},
        {"vlanTrunk": [{"id": 0}]},
        {"vlanTrunk": [{"minID": 1}]},
        {"vlanTrunk": [{}]},
        {"vlanTrunk": [{"minID": 5, "maxID": 2}]},
        {"bridge": "name/with/slashes"},
        {"bridge": "x" * 16},
        {"hairpinMode": True, "promiscMode": True},
        {"ipMasqBackend": "ebtables"},
        {"disableContainerInterface": True, "ipam": {"ranges": [[{"subnet": "10.9.0.0/24"}]]}},
        {"runtimeConfig": {"mac": "01:00:5e:00:00:01"}},
        {"runtimeConfig": {"mac": "02:00"}},
        {"runtimeConfig": {"ips": ["10.9.0.300"]}},
        {"runtimeConfig": {"ips": ["10.9.0.3/33"]}},
        {"runtimeConfig": {"portMappings": [{"hostPort": 1, "containerPort": 65536}]}},
        {"runtimeConfig": {"portMappings": [{"hostPort": 1, "containerPort": 1, "protocol": "x"}]}},
        {"runtimeConfig": {"portMappings": [{"hostPort": 1, "containerPort": 1, "hostIP": "x"}]}},
        {"runtimeConfig": {"portMappings": [{"hostPort": 1, "containerPort": 1}] * 2}},
        {"markMasqBit": 32},
        {"markMasqBit": 1, "externalSetMarkChain": "X"},
        {"ingressRate": 8, "ingressBurst": 8 << 32},
        {"ingressRate": -8, "ingressBurst": 8},
        {"sysctl": {"kernel.hostname": "x"}},
        {"sysctl": {"net.core.somaxconn": "1", "net/core/somaxconn": "2"}},
        {"sysctl": {"net.//..kernel.hostname": "x"}},
        {"ipam": {"ranges": [[{"subnet": "10.9.0.0/31"}]]}},
        {"ipam": {"ranges": [[{"subnet": "10.9.0.0/24", "gateway": "fd00::1"}]]}},
        {"ipam": {"ranges": [[{"subnet": "10.9.0.0/24"}]], "routes": [{"dst": "x"}]}},
        {"ipam": {"addresses": [{"address": "10.9.0.1"}]}},
        {"prevResult": "x"},
        {"prevResult": {"cniVersion": "1.1.0", "ips": 5}},
    ],
)
def test_bad_keys(config):
    error = refusal(config)
    assert error.code == 7
    assert error.message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("conditionsV4", ["ip", "daddr", "192.0.2.0/24"]),
        ("externalSetMarkChain", "KUBE-MARK-MASQ"),
        ("shapedSubnets", ["10.0.0.0/8"]),
    ],
)
def test_what_cannot_be_honoured_is_said_so(key, value):
    error = refusal({key: value})
    assert error.code == 2
    assert key in error.message


def test_argument_errors_are_the_environments():
    assert refusal(args="IP=10.0.0.300").code == 4
    assert refusal(args="MAC=nonsense").code == 4


@pytest.mark.parametrize("part", ["portmap", "bandwidth", "tuning", "firewall"])
def test_parts_of_a_chain_need_a_result(part):
    error = refusal(plugin=f"podwire-{part}")
    assert error.code == 7
    assert "chained" in error.message
