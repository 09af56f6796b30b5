"""Scheduling, pod CIDRs, load balancer addresses."""

import pytest

from podwire.lab.controllers.scheduler import node_refusal, selects_node

from .cluster import Cluster, workload


def pod(**spec) -> dict:
    return {"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c"}], **spec}}


def test_a_pod_waits_for_a_node_that_is_ready():
    cluster = Cluster(nodes=0)
    cluster.node("n", ready=False)
    cluster.create("Pod", pod())
    (condition,) = cluster.get("Pod", "p")["status"]["conditions"]
    assert condition["reason"] == "Unschedulable"
    assert "node.kubernetes.io/not-ready" in condition["message"]
    cluster.node("n", ready=True)
    assert cluster.get("Pod", "p")["spec"]["nodeName"] == "n"


def test_a_cordoned_node_gets_no_pod():
    cluster = Cluster(nodes=1)
    cluster.patch("Node", "node-1", {"spec": {"unschedulable": True}})
    cluster.create("Pod", pod())
    assert "nodeName" not in cluster.get("Pod", "p")["spec"]
    cluster.patch("Node", "node-1", {"spec": {"unschedulable": None}})
    assert cluster.get("Pod", "p")["spec"]["nodeName"] == "node-1"


def test_host_ports_do_not_meet_on_one_node():
    cluster = Cluster(nodes=1)
    port = {"containerPort": 80, "hostPort": 80}
    for name in ("a", "b"):
        body = pod(containers=[{"name": "c", "ports": [dict(port)]}])
        body["metadata"]["name"] = name
        cluster.create("Pod", body)
    assert "nodeName" not in cluster.get("Pod", "b")["spec"]
    cluster.delete("Pod", "a", grace_period_s=0)
    assert cluster.get("Pod", "b")["spec"]["nodeName"] == "node-1"


def test_anti_affinity_keeps_siblings_apart():
    cluster = Cluster(nodes=2)
    body = workload(replicas=3)
    term = {
        "topologyKey": "topology.kubernetes.io/zone",
        "labelSelector": {"matchLabels": {"app": "web"}},
    }
    body["spec"]["template"]["spec"]["affinity"] = {
        "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
    }
    cluster.create("Deployment", body)
    nodes = [p["spec"].get("nodeName") for p in cluster.all("Pod")]
    assert sorted(filter(None, nodes)) == ["node-1", "node-2"]


def affinity(*expressions: dict, fields: tuple = ()) -> dict:
    term = {"matchExpressions": list(expressions), "matchFields": list(fields)}
    hard = "requiredDuringSchedulingIgnoredDuringExecution"
    return {"affinity": {"nodeAffinity": {hard: {"nodeSelectorTerms": [term]}}}}


@pytest.mark.parametrize(
    ("spec", "accepted"),
    [
        ({}, True),
        ({"nodeSelector": {"disk": "ssd"}}, True),
        ({"nodeSelector": {"disk": "hdd"}}, False),
        (affinity({"key": "disk", "operator": "In", "values": ["ssd", "nvme"]}), True),
        (affinity({"key": "disk", "operator": "NotIn", "values": ["ssd"]}), False),
        (affinity({"key": "gpu", "operator": "DoesNotExist"}), True),
        (affinity({"key": "gpu", "operator": "Exists"}), False),
        (affinity({"key": "cores", "operator": "Gt", "values": ["4"]}), True),
        (affinity({"key": "cores", "operator": "Lt", "values": ["8"]}), False),
        (affinity({"key": "disk", "operator": "Gt", "values": ["4"]}), False),
        (
            affinity(fields=({"key": "metadata.name", "operator": "In", "values": ["n"]},)),
            True,
        ),
        (affinity(), False),
    ],
)
def test_selects_node(spec, accepted):
    node = {"metadata": {"name": "n", "labels": {"disk": "ssd", "cores": "8"}}}
    assert selects_node(spec, node) is accepted


@pytest.mark.parametrize(
    ("toleration", "accepted"),
    [
        (None, False),
        ({"operator": "Exists"}, True),
        ({"key": "dedicated", "operator": "Exists"}, True),
        ({"key": "dedicated", "value": "db"}, True),
        ({"key": "dedicated", "value": "web"}, False),
        ({"key": "dedicated", "operator": "Exists", "effect": "NoExecute"}, False),
    ],
)
def test_tolerations(toleration, accepted):
    taint = {"key": "dedicated", "value": "db", "effect": "NoSchedule"}
    node = {
        "metadata": {"name": "n"},
        "spec": {"taints": [taint]},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }
    spec = {"tolerations": [toleration]} if toleration else {}
    assert (node_refusal({"spec": spec}, node) == "") is accepted


def test_pod_cidrs_are_given_once_per_family_and_taken_back():
    cluster = Cluster(dual_stack=True)
    first, second = (cluster.get("Node", f"node-{i}")["spec"] for i in (1, 2))
    assert first["podCIDRs"] == ["10.244.0.0/24", "fd00:10:244::/64"]
    assert second["podCIDR"] == "10.244.1.0/24"
    cluster.delete("Node", "node-1")
    cluster.node("node-3")
    assert cluster.get("Node", "node-3")["spec"]["podCIDR"] == "10.244.0.0/24"


def balancer(name: str, **spec) -> dict:
    ports = [{"port": 80}]
    return {"metadata": {"name": name}, "spec": {"type": "LoadBalancer", "ports": ports, **spec}}


def addresses(cluster: Cluster, name: str) -> list[str]:
    ingress = cluster.get("Service", name)["status"]["loadBalancer"].get("ingress", [])
    return [one["ip"] for one in ingress]


def test_load_balancer_addresses():
    cluster = Cluster(dual_stack=True)
    cluster.create("Service", balancer("a"))
    cluster.create("Service", balancer("b", ipFamilyPolicy="PreferDualStack"))
    cluster.create("Service", balancer("c", loadBalancerIP="198.51.100.77"))
    cluster.create("Service", balancer("d", loadBalancerClass="example.com/other"))
    assert addresses(cluster, "a") == ["198.51.100.1"]
    assert addresses(cluster, "b") == ["198.51.100.2", "fd00:198::1"]
    assert addresses(cluster, "c") == ["198.51.100.77"]
    assert addresses(cluster, "d") == []
    cluster.patch("Service", "a", {"spec": {"type": "ClusterIP"}})
    assert addresses(cluster, "a") == []
    cluster.create("Service", balancer("e"))
    assert addresses(cluster, "e") == ["198.51.100.1"]
