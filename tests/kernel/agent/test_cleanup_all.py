"""An agent served a node, and `--cleanup` leaves it as it was: everything is looked at.

The agent is a process of its own on a real API, with VXLAN, Services, policies and a pod wired by
CNI. What is kept of the pod by intention (its link) goes before.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from bench.cluster import NODE_IP, Cluster
from podwire.agent.sysctls import FILE, Sysctls
from podwire.cni.protocol import TRY_AGAIN
from podwire.datapath.ebpf import pinned, programs
from podwire.kernel import netns, sysctl
from podwire.kernel.bpf import pins
from podwire.kernel.iptables import installed

PATHS = {
    "nftables": ["--wiring=bridge"],
    "iptables": ["--wiring=bridge"],
    "ebpf": ["--wiring=routed"],
}
# counters, and what the kernel makes up by itself
_RESTLESS = ("nf_conntrack_count", "stable_secret", "/neigh/", "rt_cache", "/route/")
# iptables-nft makes them when it first looks at a table; they are its own
_EMPTY_TABLE = re.compile(
    r"table ip6? (nat|mangle|filter) \{\n"
    r"(\tchain [A-Z]+ \{\n\t\ttype [^\n]*policy accept;\n\t\}\n\n?)*\}\n"
)


def objects():
    yield {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "other"},
        "spec": {"podCIDR": "10.244.4.0/24", "podCIDRs": ["10.244.4.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.12"}]},
    }
    yield {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "type": "NodePort",
            "clusterIP": "10.96.0.9",
            "clusterIPs": ["10.96.0.9"],
            "selector": {"app": "web"},
            "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"}],
        },
    }
    yield {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "shut", "namespace": "default"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
    }


def pod(node):
    yield {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "namespace": "default", "uid": "u-1", "labels": {"app": "web"}},
        "spec": {"nodeName": node, "containers": [{"name": "c", "image": "none"}]},
        "status": {"phase": "Running"},
    }


class Node:
    """A cluster with one agent; `cni` calls its plugin for the pod."""

    def __init__(self, name):
        self.cluster = Cluster(name)
        self.cluster.load(objects)
        self.cluster.load(pod, name)
        self.pod = netns.create()
        self.process = None

    @property
    def run_dir(self):
        return self.cluster.folder / "run"

    def start(self, *flags):
        self.process = self.cluster.agent(
            "--routing=vxlan", "--healthz-bind-address=127.0.0.1:0",
            "--metrics-bind-address=127.0.0.1:0", *flags,
        )  # fmt: skip
        self.cluster.wait_healthy()

    def die(self):
        self.process.kill()
        self.process.wait(10)

    def cni(self, command, container="c1"):
        configuration = {"cniVersion": "1.0.0", "name": "podwire", "type": "podwire"}
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container,
            "CNI_NETNS": f"/proc/{os.getpid()}/fd/{self.pod}",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": "/nowhere",
            "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=p;K8S_POD_UID=u-1",
            "PODWIRE_CNI_SOCKET": str(self.run_dir / "cni.sock"),
        }
        plugin = Path(programs.OBJECTS).parent / "podwire-cni"
        deadline = time.monotonic() + 30
        while True:
            done = netns.call(
                self.cluster.netns_fd,
                lambda: subprocess.run(
                    [plugin], input=json.dumps(configuration), env=environment, text=True,
                    capture_output=True, timeout=60,
                ),
            )  # fmt: skip
            answer = json.loads(done.stdout or "{}")
            if done.returncode == 0:
                return answer
            again = answer.get("code") == TRY_AGAIN and time.monotonic() < deadline
            assert again, answer
            time.sleep(0.1)

    def end_pod(self):
        """Its namespace goes, and its link in the background."""
        os.close(self.pod)
        self.pod = -1

    def close(self):
        self.cluster.__exit__()
        if self.pod >= 0:
            self.end_pod()


@pytest.fixture
def node(request, run_prefix):
    if request.param == "ebpf" and programs.missing():
        pytest.skip(f"this machine lacks {', '.join(programs.missing())}")
    if request.param == "iptables" and not installed("nft"):
        pytest.skip("no iptables here")
    made = Node(f"{run_prefix}-{request.param}")
    made.path, made.flags = request.param, PATHS[request.param]
    yield made
    made.close()
    with contextlib.suppress(FileNotFoundError):
        pins.remove(pinned.folder(made.cluster.node))


EVERY_PATH = pytest.mark.parametrize("node", list(PATHS), indirect=True)


def picture(fd):
    """Everything in a namespace that an agent could have touched, by what shows it."""
    commands = {
        "links": ["ip", "-d", "-o", "link"],
        "addresses": ["ip", "-o", "address"],
        "IPv4 routes": ["ip", "-4", "route", "show", "table", "all"],
        "IPv6 routes": ["ip", "-6", "route", "show", "table", "all"],
        "IPv4 rules": ["ip", "-4", "rule"],
        "IPv6 rules": ["ip", "-6", "rule"],
        "neighbours": ["ip", "neigh", "show", "nud", "permanent"],
        "forwarding entries": ["bridge", "fdb"],
        "nftables": ["nft", "list", "ruleset"],
        "ipsets": ["ipset", "list", "-n"],
        "qdiscs": ["tc", "qdisc"],
        "eBPF at links": ["bpftool", "net"],
    }
    for tool in ("iptables-legacy", "ip6tables-legacy"):
        commands[tool] = [f"{tool}-save"]
    seen = {}
    for what, command in commands.items():
        text = netns.run(fd, command, timeout_s=20).stdout
        lines = _EMPTY_TABLE.sub("", text).splitlines()
        seen[what] = [line for line in lines if not line.startswith("#")]
    seen["sysctls"] = netns.call(fd, sysctls)
    return seen


def settled(fd):
    """The picture when the kernel has given links their addresses."""
    deadline = time.monotonic() + 20
    now = picture(fd)
    while "tentative" in str(now["addresses"]) or "inet6 fe80" not in str(now["addresses"]):
        assert time.monotonic() < deadline, now["addresses"]
        time.sleep(0.1)
        now = picture(fd)
    return now


def sysctls():
    found = {}
    for path in Path("/proc/sys/net").rglob("*"):
        if path.is_file() and not any(word in str(path) for word in _RESTLESS):
            with contextlib.suppress(OSError):
                found[str(path)] = path.read_text()
    return found


def differences(before, after):
    out = {}
    for what, was in before.items():
        if isinstance(was, dict):
            keys = was.keys() | after[what].keys()
            wrong = {k: (was.get(k), after[what].get(k)) for k in keys
                     if was.get(k) != after[what].get(k)}  # fmt: skip
        else:
            wrong = sorted(set(was) ^ set(after[what]))
        if wrong:
            out[what] = wrong
    return out


@EVERY_PATH
def test_all_is_as_it_was(node):
    fd = node.cluster.netns_fd
    before = settled(fd)
    node.start(f"--datapath={node.path}", *node.flags)
    node.cni("ADD")
    served = differences(before, picture(fd))
    assert {"links", "addresses", "IPv4 routes", "neighbours", "sysctls"} <= served.keys()
    assert (pinned.folder(node.cluster.node)).exists() == (node.path == "ebpf")
    node.cni("DEL")
    node.end_pod()
    node.cluster.stop(node.process)
    node.cluster.cleanup()
    netns.run(fd, ["ip", "link", "del", "cni0"])  # kept by intention, as pods' links are
    assert not pinned.folder(node.cluster.node).exists()
    deadline = time.monotonic() + 10
    while (left := differences(before, picture(fd))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == {}, json.dumps(left, indent=1)


@pytest.mark.parametrize("node", ["nftables", "ebpf"], indirect=True)
def test_after_a_boot_what_is_on_disk_meets_an_empty_kernel(node):
    """The state names a pod whose link is gone; pins, rules and the socket's folder are gone."""
    node.start(f"--datapath={node.path}", *node.flags)
    first = node.cni("ADD")["ips"]
    forget_everything(node)
    node.start(f"--datapath={node.path}", *node.flags)
    status = node.cluster.status()
    assert status["healthy"], status["reasons"]
    node.pod = netns.create()
    again = node.cni("ADD", "c2")["ips"]
    assert {ip["address"] for ip in again}.isdisjoint(ip["address"] for ip in first), "it rests"
    check(node, again)


def forget_everything(node):
    """What a boot does, in the same namespace: the kernel's state and what lies in memory go."""
    node.die()
    node.end_pod()
    fd = node.cluster.netns_fd
    for command in (["nft", "flush", "ruleset"], ["ipset", "destroy"]):
        netns.run(fd, command)
    for name in ("podwire.vxlan", "cni0"):
        netns.run(fd, ["ip", "link", "del", name])
    if pinned.folder(node.cluster.node).exists():
        pins.remove(pinned.folder(node.cluster.node))
    shutil.rmtree(node.run_dir)
    netns.call(fd, lambda: sysctl.write({"net.ipv4.ip_forward": 0}))


def check(node, ips):
    """The pod has its address, and reaches its node."""
    address = ips[0]["address"].partition("/")[0]
    assert address in netns.run(node.pod, ["ip", "-o", "address"]).stdout
    done = netns.run(node.pod, ["ping", "-c1", "-W5", NODE_IP], timeout_s=20)
    assert done.returncode == 0, done.stdout
    assert netns.call(node.cluster.netns_fd, lambda: sysctl.read("net.ipv4.ip_forward")) == "1"


@pytest.mark.parametrize("node", ["ebpf"], indirect=True)
def test_pins_that_a_namespace_left_which_is_gone_are_no_hindrance(node):
    other = netns.create()
    made = programs.Programs(node.cluster.node, other)
    made.enable("services", "policy", "pods")
    made.close()
    os.close(other)
    node.start(f"--datapath={node.path}", *node.flags)
    check(node, node.cni("ADD")["ips"])


FILTER = "net.ipv4.conf.all.rp_filter"


@pytest.fixture
def after_cleanup(netns_fd, tmp_path):
    """What becomes of a parameter that was 0 and that an agent set to 2, after these steps."""

    def play(*steps):
        def run():
            sysctl.write({FILTER: 0})
            Sysctls(tmp_path).set(FILTER, "2")
            for step in steps:
                step()
            Sysctls(tmp_path).cleanup()
            return sysctl.read(FILTER)

        return netns.call(netns_fd, run)

    return play


def test_sysctls_are_put_back_unless_somebody_changed_them_since(after_cleanup, tmp_path):
    def somebody():
        sysctl.write({FILTER: 1})

    def a_later_agent():
        Sysctls(tmp_path).set(FILTER, "2")
        Sysctls(tmp_path).set("net.ipv4.ip_forward", "1")

    assert after_cleanup() == "0"
    assert not (tmp_path / FILE).exists()
    assert after_cleanup(somebody) == "1"
    assert after_cleanup(somebody, a_later_agent) == "0"


def test_what_an_earlier_boot_noted_counts_for_nothing(after_cleanup, tmp_path):
    def boot():
        path = tmp_path / FILE
        path.write_text(re.sub('"boot":"[^"]*"', '"boot":"another"', path.read_text()))

    assert after_cleanup(boot) == "2"
