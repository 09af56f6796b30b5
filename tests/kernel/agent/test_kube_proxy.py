"""A node that kube-proxy served: podwire takes over under its connections, on each data path.

The rules are laid out as kube-proxy writes them (kubernetes pkg/proxy/iptables/proxier.go,
pkg/proxy/nftables/proxier.go): one Service with a NodePort and one endpoint, pod1.
"""

import os
import shutil

import pytest

from podwire.agent import ebpf as agent_ebpf
from podwire.agent.datapaths import DataPath
from podwire.agent.options import Options
from podwire.datapath.ebpf import programs
from podwire.datapath.ebpf.pods import EbpfPods
from podwire.kernel import netns
from tests.kernel.ebpf_agent import Talk, ports
from tests.kernel.ebpf_services import VIP, make_table
from tests.kernel.ebpf_world import NODE, POD, World

PODS = {4: "10.244.0.0/24", 6: "fd44::/64"}
# kubelet's: they stay
KUBELETS = {
    "mangle": ["KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"],
    "filter": ["KUBE-FIREWALL"],
}


def comment(text):
    return f'-m comment --comment "{text}"'


def iptables_rules(family):
    vip, node, pod = VIP[family], NODE[family], POD[1][family]
    to = pod if family == 4 else f"[{pod}]"
    bits = 32 if family == 4 else 128
    new = "-m conntrack --ctstate NEW"
    outside = comment("kubernetes externally-visible service portals")
    return f"""*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT {new} {comment("kubernetes load balancer firewall")} -j KUBE-PROXY-FIREWALL
-A INPUT {comment("kubernetes health check service ports")} -j KUBE-NODEPORTS
-A INPUT {new} {outside} -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD {new} {comment("kubernetes load balancer firewall")} -j KUBE-PROXY-FIREWALL
-A FORWARD {comment("kubernetes forwarding rules")} -j KUBE-FORWARD
-A FORWARD {new} {comment("kubernetes service portals")} -j KUBE-SERVICES
-A FORWARD {new} {outside} -j KUBE-EXTERNAL-SERVICES
-A OUTPUT {new} {comment("kubernetes load balancer firewall")} -j KUBE-PROXY-FIREWALL
-A OUTPUT {new} {comment("kubernetes service portals")} -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD {comment("kubernetes forwarding rules")} -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:KUBE-EXT-QQSECDU6NMHBOUAD - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SEP-VFQBVTOAP2GYQBHT - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-QQSECDU6NMHBOUAD - [0:0]
-A PREROUTING {comment("kubernetes service portals")} -j KUBE-SERVICES
-A OUTPUT {comment("kubernetes service portals")} -j KUBE-SERVICES
-A POSTROUTING {comment("kubernetes postrouting rules")} -j KUBE-POSTROUTING
-A KUBE-EXT-QQSECDU6NMHBOUAD {comment("masquerade traffic for x/web")} -j KUBE-MARK-MASQ
-A KUBE-EXT-QQSECDU6NMHBOUAD -j KUBE-SVC-QQSECDU6NMHBOUAD
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-NODEPORTS -d {node}/{bits} -p tcp {comment("x/web")} -m tcp --dport 30080 \
-j KUBE-EXT-QQSECDU6NMHBOUAD
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING {comment("kubernetes service traffic requiring SNAT")} -j MASQUERADE \
--random-fully
-A KUBE-SEP-VFQBVTOAP2GYQBHT -s {pod}/{bits} {comment("x/web")} -j KUBE-MARK-MASQ
-A KUBE-SEP-VFQBVTOAP2GYQBHT -p tcp {comment("x/web")} -m tcp -j DNAT --to-destination {to}:80
-A KUBE-SERVICES -d {vip}/{bits} -p tcp {comment("x/web cluster IP")} -m tcp --dport 80 \
-j KUBE-SVC-QQSECDU6NMHBOUAD
-A KUBE-SERVICES {comment("kubernetes service nodeports")} -m addrtype --dst-type LOCAL \
-j KUBE-NODEPORTS
-A KUBE-SVC-QQSECDU6NMHBOUAD ! -s {PODS[family]} -d {vip}/{bits} -p tcp -m tcp --dport 80 \
-j KUBE-MARK-MASQ
-A KUBE-SVC-QQSECDU6NMHBOUAD {comment("x/web -> pod1")} -j KUBE-SEP-VFQBVTOAP2GYQBHT
COMMIT
"""


def nftables_rules(family):
    vip, node, pod = VIP[family], NODE[family], POD[1][family]
    ip = "ip" if family == 4 else "ip6"
    kind = "ipv4_addr" if family == 4 else "ipv6_addr"
    to = pod if family == 4 else f"[{pod}]"
    return f"""
table {ip} kube-proxy {{
  comment "rules for kube-proxy"
  set cluster-ips {{ type {kind}; elements = {{ {vip} }} }}
  set nodeport-ips {{ type {kind}; elements = {{ {node} }} }}
  map service-ips {{
    type {kind} . inet_proto . inet_service : verdict
    elements = {{ {vip} . tcp . 80 : goto service-ABC-x/web/tcp/ }}
  }}
  map service-nodeports {{
    type inet_proto . inet_service : verdict
    elements = {{ tcp . 30080 : goto external-ABC-x/web/tcp/ }}
  }}
  map no-endpoint-services {{ type {kind} . inet_proto . inet_service : verdict; }}
  chain filter-forward {{
    type filter hook forward priority -110; policy accept;
    ct state new jump service-endpoints-check
  }}
  chain nat-prerouting {{ type nat hook prerouting priority -100; policy accept; jump services; }}
  chain nat-output {{ type nat hook output priority -100; policy accept; jump services; }}
  chain nat-postrouting {{
    type nat hook postrouting priority 100; policy accept; jump masquerading;
  }}
  chain service-endpoints-check {{
    {ip} daddr . meta l4proto . th dport vmap @no-endpoint-services
  }}
  chain services {{
    {ip} daddr . meta l4proto . th dport vmap @service-ips
    {ip} daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
  }}
  chain masquerading {{
    meta mark & 0x4000 == 0 return
    meta mark set meta mark ^ 0x4000
    masquerade fully-random
  }}
  chain mark-for-masquerade {{ meta mark set meta mark | 0x4000; }}
  chain external-ABC-x/web/tcp/ {{
    jump mark-for-masquerade
    goto service-ABC-x/web/tcp/
  }}
  chain service-ABC-x/web/tcp/ {{
    {ip} daddr {vip} tcp dport 80 {ip} saddr != {PODS[family]} jump mark-for-masquerade
    numgen random mod 1 vmap {{ 0 : goto endpoint-ABC-x/web/tcp/ }}
  }}
  chain endpoint-ABC-x/web/tcp/ {{
    {ip} saddr {pod} jump mark-for-masquerade
    meta l4proto tcp dnat to {to}:80
  }}
}}
"""


def put_rules(world, mode):
    """As kube-proxy leaves them when its DaemonSet is deleted."""
    node = world.spaces["node"]
    for family in (4, 6):
        if mode == "nftables":
            command, script = ["nft", "-f", "-"], nftables_rules(family)
        else:
            tool = mode if family == 4 else mode.replace("iptables", "ip6tables")
            command, script = [f"{tool}-restore", "--noflush"], iptables_rules(family)
        done = netns.run(node, command, stdin=script, timeout_s=20)
        assert done.returncode == 0, done.stderr


def left(world, mode):
    """Chains and tables of kube-proxy that are there."""
    node = world.spaces["node"]
    if mode == "nftables":
        tables = netns.run(node, ["nft", "list", "tables"]).stdout.splitlines()
        return [table for table in tables if "kube-proxy" in table]
    found = []
    for tool in (mode, mode.replace("iptables", "ip6tables")):
        saved = netns.run(node, [f"{tool}-save"]).stdout
        names = [line.split()[0] for line in saved.splitlines() if line.startswith(":KUBE-")]
        found += sorted(name[1:] for name in names)
    return found


def take_over(world, datapath, complete=True):
    """An agent's data path in a process that lives in the node; it leaves like one that stops."""
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return
    try:
        netns.enter(world.spaces["node"])
        agent_ebpf.features.has_cgroup2 = lambda: None  # it is the machine's
        options = Options(
            node_name=world.name, datapath=datapath, wiring="routed", parts=("services", "cni")
        )
        path = DataPath(options.checked())
        table = make_table(ports())
        part = path.services(table.settings.config)
        part.start()
        if path.programs is not None:
            serve_pods(world, path.programs)
        part.apply(table)
        assert path.take_over(complete) is complete
        os._exit(0)
    finally:
        os._exit(1)


def serve_pods(world, made):
    pods = EbpfPods(made)
    pods.start()
    pods.replace(world.pod_link(n) for n in (1, 2))


def talks(world):
    """By the Service from a pod, from the node and from outside, in both families."""
    found = [
        Talk(world, space, target, pause=0.002)
        for family in (4, 6)
        for space, target in (
            ("pod2", (VIP[family], 80)),
            ("node", (VIP[family], 80)),
            ("outside", (NODE[family], 30080)),
        )
    ]
    for talk in found:
        talk.start()
    return found


def go_on(found):
    """Each speaks again and again, or says why not."""
    before = [talk.turns for talk in found]
    while any(t.is_alive() and t.turns < n + 5 for t, n in zip(found, before, strict=True)):
        found[0].join(timeout=0.01)
    assert [f"{talk.name}: {talk.failure}" for talk in found if talk.failure] == []


@pytest.mark.parametrize("datapath", ["nftables", "ebpf"])
@pytest.mark.parametrize("mode", ["iptables-nft", "iptables-legacy", "nftables"])
def test_connections_go_on_and_its_rules_go(mode, datapath):
    if not shutil.which("nft" if mode == "nftables" else mode):
        pytest.skip(f"no {mode} here")
    if datapath == "ebpf" and programs.missing():
        pytest.skip(f"this machine lacks {', '.join(programs.missing())}")
    with World() as world:
        for family in (4, 6):
            world.echo("pod1", POD[1][family], 80)
        put_rules(world, mode)
        theirs = left(world, mode)
        by_theirs = talks(world)
        go_on(by_theirs)

        take_over(world, datapath, complete=False)
        assert left(world, mode) == theirs, "ours is not complete: theirs serve"
        go_on(by_theirs + talks(world))

        take_over(world, datapath)
        kept = [name for names in KUBELETS.values() for name in names]
        assert left(world, mode) == ([] if mode == "nftables" else sorted(kept) * 2)
        by_ours = talks(world)
        go_on(by_theirs + by_ours)
        for talk in by_theirs + by_ours:
            talk.stopped.set()
        for talk in by_theirs + by_ours:
            talk.join(timeout=10)
        assert [talk.failure for talk in by_theirs + by_ours if talk.failure] == []
