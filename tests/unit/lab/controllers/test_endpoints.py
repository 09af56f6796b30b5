from .cluster import Cluster, workload


def service(name: str = "web", **spec) -> dict:
    ports = [{"name": "http", "port": 80, "targetPort": "http"}]
    return {
        "metadata": {"name": name},
        "spec": {"selector": {"app": "web"}, "ports": ports, **spec},
    }


def slices(cluster: Cluster, family: str = "IPv4") -> list[dict]:
    return [one for one in cluster.all("EndpointSlice") if one["addressType"] == family]


def addresses(cluster: Cluster, family: str = "IPv4") -> list[str]:
    return sorted(
        address
        for one in slices(cluster, family)
        for endpoint in one["endpoints"]
        for address in endpoint["addresses"]
    )


def test_endpoints_follow_the_pods():
    cluster = Cluster()
    cluster.create("Service", service())
    (empty,) = slices(cluster)
    assert empty["endpoints"] == [], "known, and nobody there"
    cluster.create("Deployment", workload(replicas=2))
    assert addresses(cluster) == [], "no pod has an address yet"
    cluster.run()
    (piece,) = slices(cluster)
    assert addresses(cluster) == ["10.244.9.1", "10.244.9.2"]
    assert piece["ports"] == [{"name": "http", "port": 8080, "protocol": "TCP"}]
    labels = piece["metadata"]["labels"]
    assert labels["kubernetes.io/service-name"] == "web"
    endpoint = piece["endpoints"][0]
    assert endpoint["conditions"] == {"ready": True, "serving": True, "terminating": False}
    assert endpoint["zone"] == {"node-1": "a", "node-2": "b"}[endpoint["nodeName"]]
    assert endpoint["targetRef"]["kind"] == "Pod"
    (subset,) = cluster.get("Endpoints", "web")["subsets"]
    assert [one["ip"] for one in subset["addresses"]] == addresses(cluster)


def test_conditions_of_pods_that_are_not_ready_or_going():
    cluster = Cluster()
    cluster.create("Service", service())
    cluster.create("Service", service("all", publishNotReadyAddresses=True))
    cluster.create("Deployment", workload(replicas=2))
    cluster.run()
    first, second = cluster.names("Pod")
    cluster.status("default", first, ready=False)
    cluster.registry.delete(cluster.resource("Pod"), "default", second)
    cluster.settle()
    found = {
        (one["metadata"]["labels"]["kubernetes.io/service-name"], e["targetRef"]["name"]): tuple(
            e["conditions"][name] for name in ("ready", "serving", "terminating")
        )
        for one in slices(cluster)
        for e in one["endpoints"]
        if e["targetRef"]["name"] in (first, second)
    }
    assert found == {
        ("web", first): (False, False, False),
        ("web", second): (False, True, True),
        ("all", first): (True, False, False),
        ("all", second): (True, True, True),
    }


def test_a_pod_that_is_done_is_no_endpoint():
    cluster = Cluster()
    cluster.create("Service", service())
    cluster.create("Deployment", workload(replicas=1))
    cluster.run()
    (name,) = cluster.names("Pod")
    cluster.status("default", name, phase="Succeeded")
    cluster.settle()
    assert "10.244.9.1" not in addresses(cluster)


def test_a_slice_holds_a_hundred_and_changes_touch_one():
    cluster = Cluster()
    cluster.create("Service", service())
    cluster.create("Deployment", workload(replicas=250))
    cluster.run()
    assert sorted(len(one["endpoints"]) for one in slices(cluster)) == [50, 100, 100]
    before = {
        one["metadata"]["name"]: one["metadata"]["resourceVersion"] for one in slices(cluster)
    }
    cluster.patch("Deployment", "web", {"spec": {"replicas": 251}})
    cluster.run()
    after = {one["metadata"]["name"]: one["metadata"]["resourceVersion"] for one in slices(cluster)}
    assert len(set(before.items()) - set(after.items())) == 1
    assert before.keys() == after.keys()


def test_a_named_port_that_differs_makes_slices_of_its_own():
    cluster = Cluster()
    cluster.create("Service", service())
    cluster.create("Deployment", workload(replicas=1))
    other = workload("web", replicas=1)
    other["metadata"]["name"] = "other"
    other["spec"]["selector"] = {"matchLabels": {"app": "web", "v": "2"}}
    other["spec"]["template"]["metadata"]["labels"]["v"] = "2"
    other["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"] = 9090
    cluster.create("Deployment", other)
    cluster.run()
    assert sorted(one["ports"][0]["port"] for one in slices(cluster)) == [8080, 9090]


def test_dual_stack_has_slices_per_family():
    cluster = Cluster(dual_stack=True)
    cluster.create("Service", service(ipFamilyPolicy="RequireDualStack"))
    cluster.create("Deployment", workload(replicas=1))
    cluster.run()
    assert addresses(cluster, "IPv4") == ["10.244.9.1"]
    assert addresses(cluster, "IPv6") == ["fd00:10:244::1"]


def test_headless_services_have_hostnames():
    cluster = Cluster()
    cluster.create("Service", service("db", clusterIP="None", selector={"app": "db"}))
    cluster.create("StatefulSet", workload("db", replicas=2, serviceName="db"))
    cluster.run()
    (piece,) = slices(cluster)
    assert "service.kubernetes.io/headless" in piece["metadata"]["labels"]
    assert sorted(e["hostname"] for e in piece["endpoints"]) == ["db-0", "db-1"]


def test_hints_follow_the_traffic_distribution():
    cluster = Cluster()
    cluster.create("Service", service(trafficDistribution="PreferSameNode"))
    cluster.create("Deployment", workload(replicas=1))
    cluster.run()
    (endpoint,) = slices(cluster)[0]["endpoints"]
    assert endpoint["hints"] == {
        "forZones": [{"name": endpoint["zone"]}],
        "forNodes": [{"name": endpoint["nodeName"]}],
    }
    cluster.patch("Service", "web", {"spec": {"trafficDistribution": None}})
    (endpoint,) = slices(cluster)[0]["endpoints"]
    assert "hints" not in endpoint


def test_the_slices_go_with_the_service_and_come_back_when_somebody_deletes_them():
    cluster = Cluster()
    cluster.create("Service", service())
    (first,) = cluster.names("EndpointSlice")
    cluster.delete("EndpointSlice", first)
    assert len(cluster.names("EndpointSlice")) == 1
    cluster.delete("Service", "web")
    assert not cluster.names("EndpointSlice")
    assert not cluster.names("Endpoints")
