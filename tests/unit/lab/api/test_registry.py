"""The API's semantics, without HTTP."""

from datetime import UTC, datetime

import pytest

from podwire.lab.api.addresses import ServiceAddresses
from podwire.lab.api.manifests import apply_all, delete_all
from podwire.lab.api.registry import MERGE_PATCH, STRATEGIC_PATCH, DeleteOptions, Registry
from podwire.lab.api.status import StatusError


@pytest.fixture
def registry():
    return make()


def make(*cidrs: str) -> Registry:
    addresses = ServiceAddresses(cidrs or ["10.96.0.0/24"], (30000, 30010))
    registry = Registry(addresses, now=lambda: datetime(2026, 1, 1, tzinfo=UTC))
    registry.create(registry.namespaces, "", {"metadata": {"name": "default"}})
    return registry


class Api:
    """Short forms for one kind."""

    def __init__(self, registry: Registry, kind: str, api_version: str = "v1") -> None:
        self.registry = registry
        self.resource = registry.resource(kind, api_version)

    def create(self, name: str = "a", spec: dict | None = None, **metadata) -> dict:
        body: dict = {"metadata": {"name": name, **metadata}}
        if spec is not None:
            body["spec"] = spec
        return self.registry.create(self.resource, "default", body).obj

    def update(self, obj: dict, **more) -> dict:
        return self.registry.update(self.resource, "default", obj, **more).obj

    def patch(self, name: str, patch: dict, style: str = MERGE_PATCH, **more) -> dict:
        record, _ = self.registry.patch(self.resource, "default", name, patch, style, **more)
        return record.obj

    def delete(self, name: str, **options) -> bool:
        _, gone = self.registry.delete(self.resource, "default", name, DeleteOptions(**options))
        return gone


# --- metadata ------------------------------------------------------------------------------------


def test_create_fills_the_metadata_in(registry):
    maps = Api(registry, "ConfigMap")
    made = maps.create(resourceVersion="99", uid="mine", selfLink="x")["metadata"]
    assert made["creationTimestamp"] == "2026-01-01T00:00:00Z"
    assert made["uid"] != "mine"
    assert made["resourceVersion"] == str(registry.storage.version)
    generated = registry.create(maps.resource, "default", {"metadata": {"generateName": "x-"}}).obj[
        "metadata"
    ]["name"]
    assert generated.startswith("x-")
    assert len(generated) == 7


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"metadata": {"name": "a", "namespace": "other"}}, 400),
        ({"kind": "Secret", "metadata": {"name": "a"}}, 400),
        ({"metadata": {}}, 422),
        ({"metadata": {"name": "A"}}, 422),
        ({"metadata": "no"}, 400),
        ({"metadata": {"name": "a", "labels": {"-": "x"}}}, 422),
    ],
)
def test_create_refuses(registry, body, code):
    with pytest.raises(StatusError) as error:
        registry.create(registry.resource("ConfigMap"), "default", body)
    assert error.value.status == code


def test_create_needs_its_namespace_and_a_free_name(registry):
    maps = Api(registry, "ConfigMap")
    with pytest.raises(StatusError, match='namespaces "none" not found'):
        registry.create(maps.resource, "none", {"metadata": {"name": "a"}})
    maps.create()
    with pytest.raises(StatusError, match='configmaps "a" already exists'):
        maps.create()


def test_versions_guard_updates(registry):
    maps = Api(registry, "ConfigMap")
    old = maps.create()
    maps.patch("a", {"data": {"k": "1"}})
    with pytest.raises(StatusError, match="object has been modified") as error:
        maps.update({**old, "data": {"k": "2"}})
    assert error.value.status == 409
    with pytest.raises(StatusError, match="UID in precondition"):
        maps.update({"metadata": {"name": "a", "uid": "another"}})
    with pytest.raises(StatusError, match="object has been modified"):
        maps.patch("a", {"metadata": {"resourceVersion": "1"}, "data": {}})


def test_writing_what_is_there_changes_nothing(registry):
    maps = Api(registry, "ConfigMap")
    maps.create()
    version = registry.storage.version
    maps.patch("a", {"metadata": {"labels": None}})
    maps.update({"metadata": {"name": "a"}})
    assert registry.storage.version == version


def test_status_and_spec_are_separate_doors(registry):
    deployments = Api(registry, "Deployment", "apps/v1")
    spec = {
        "selector": {"matchLabels": {"a": "b"}},
        "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c"}]}},
    }
    made = deployments.create("a", spec)
    assert made["metadata"]["generation"] == 1
    done = deployments.patch("a", {"spec": {"replicas": 9}, "status": {"replicas": 3}},
                             subresource="status")  # fmt: skip
    assert (done["spec"]["replicas"], done["status"]["replicas"]) == (1, 3)
    done = deployments.patch("a", {"spec": {"replicas": 2}, "status": {"replicas": 7}})
    assert (done["spec"]["replicas"], done["status"]["replicas"]) == (2, 3)
    assert done["metadata"]["generation"] == 2


def test_a_stored_object_is_never_changed_in_place(registry):
    services = Api(registry, "Service")
    first = services.create("a", {"ports": [{"port": 80}]})
    snapshot = repr(first)
    services.patch("a", {"spec": {"ports": [{"port": 80, "name": "x"}]}}, STRATEGIC_PATCH)
    services.patch("a", {"metadata": {"labels": {"a": "b"}}})
    assert repr(first) == snapshot


def test_strategic_merge_is_only_for_builtin_kinds(registry):
    policies = Api(registry, "CiliumNetworkPolicy", "cilium.io/v2")
    policies.create("a", {"endpointSelector": {}})
    with pytest.raises(StatusError) as error:
        policies.patch("a", {"spec": {}}, STRATEGIC_PATCH)
    assert error.value.status == 415


# --- deletion ------------------------------------------------------------------------------------


def test_finalizers_hold_an_object(registry):
    maps = Api(registry, "ConfigMap")
    maps.create(finalizers=["example.com/hold"])
    assert not maps.delete("a")
    marked = registry.get(maps.resource, "default", "a").obj["metadata"]
    assert marked["deletionTimestamp"] == "2026-01-01T00:00:00Z"
    assert not maps.delete("a"), "again is no change"
    maps.patch("a", {"metadata": {"finalizers": None}})
    assert registry.find(maps.resource, "default", "a") is None


def test_a_running_pod_is_given_time(registry):
    pods = Api(registry, "Pod")
    spec = {"containers": [{"name": "c"}], "nodeName": "n"}
    pods.create("a", dict(spec))
    assert not pods.delete("a")
    metadata = registry.get(pods.resource, "default", "a").obj["metadata"]
    assert metadata["deletionGracePeriodSeconds"] == 30
    assert metadata["deletionTimestamp"] == "2026-01-01T00:00:30Z"
    assert not pods.delete("a", grace_period_s=60), "the period is never made longer"
    assert pods.delete("a", grace_period_s=0)
    pods.create("b", {"containers": [{"name": "c"}]})
    assert pods.delete("b"), "it never reached a node"


def test_delete_preconditions(registry):
    maps = Api(registry, "ConfigMap")
    uid = maps.create()["metadata"]["uid"]
    with pytest.raises(StatusError, match="UID in precondition"):
        maps.delete("a", uid="another")
    assert maps.delete("a", uid=uid)
    with pytest.raises(StatusError, match="not found"):
        maps.delete("a")


# --- Services ------------------------------------------------------------------------------------


def test_addresses_are_given_once_and_taken_back(registry):
    services = Api(registry, "Service")
    first = services.create("a", {"ports": [{"port": 80}]})["spec"]
    second = services.create("b", {"ports": [{"port": 80}]})["spec"]
    assert first["clusterIP"] != second["clusterIP"]
    assert first["clusterIPs"] == [first["clusterIP"]]
    with pytest.raises(StatusError, match="provided IP is already allocated"):
        services.create("c", {"ports": [{"port": 80}], "clusterIP": first["clusterIP"]})
    with pytest.raises(StatusError, match="not in the valid range"):
        services.create("c", {"ports": [{"port": 80}], "clusterIP": "10.97.0.1"})
    with pytest.raises(StatusError, match="may not change once set"):
        services.patch("a", {"spec": {"clusterIP": "10.96.0.99", "clusterIPs": ["10.96.0.99"]}})
    services.delete("a")
    again = services.create("c", {"ports": [{"port": 80}], "clusterIP": first["clusterIP"]})
    assert again["spec"]["clusterIP"] == first["clusterIP"]


def test_an_update_without_addresses_keeps_them(registry):
    services = Api(registry, "Service")
    old = services.create("a", {"type": "NodePort", "ports": [{"port": 80}]})
    new = services.update({"metadata": {"name": "a"},
                           "spec": {"type": "NodePort", "ports": [{"port": 80}]}})  # fmt: skip
    assert new["spec"] == old["spec"]


def test_every_address_is_used_before_the_range_is_full():
    registry = make("10.96.0.0/28")
    services = Api(registry, "Service")
    given = {services.create(f"s{i}", {"ports": [{"port": 80}]})["spec"]["clusterIP"]
             for i in range(14)}  # fmt: skip
    assert len(given) == 14
    with pytest.raises(StatusError, match="range is full"):
        services.create("late", {"ports": [{"port": 80}]})


@pytest.mark.parametrize(
    ("spec", "families", "count"),
    [
        ({}, ["IPv4"], 1),
        ({"ipFamilyPolicy": "PreferDualStack"}, ["IPv4", "IPv6"], 2),
        ({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6"]}, ["IPv6", "IPv4"], 2),
        ({"ipFamilies": ["IPv6"]}, ["IPv6"], 1),
        ({"clusterIP": "fd00::77"}, ["IPv6"], 1),
        ({"clusterIP": "None", "selector": {"a": "b"}}, ["IPv4"], 1),
        ({"clusterIP": "None"}, ["IPv4", "IPv6"], 1),
    ],
)
def test_families(spec, families, count):
    services = Api(make("10.96.0.0/24", "fd00::/112"), "Service")
    made = services.create("a", {"ports": [{"port": 80}], **spec})["spec"]
    assert made["ipFamilies"] == families
    assert len(made["clusterIPs"]) == count
    assert made["clusterIP"] == made["clusterIPs"][0]


def test_a_single_stack_cluster_says_what_it_lacks(registry):
    services = Api(registry, "Service")
    with pytest.raises(StatusError, match="not configured for dual-stack"):
        services.create("a", {"ports": [{"port": 80}], "ipFamilyPolicy": "RequireDualStack"})
    with pytest.raises(StatusError, match=r"spec.ipFamilies\[0\].*not configured"):
        services.create("a", {"ports": [{"port": 80}], "ipFamilies": ["IPv6"]})


def test_dual_stack_comes_and_goes():
    services = Api(make("10.96.0.0/24", "fd00::/112"), "Service")
    first = services.create("a", {"ports": [{"port": 80}]})["spec"]["clusterIP"]
    both = services.patch("a", {"spec": {"ipFamilyPolicy": "PreferDualStack"}})["spec"]
    assert both["clusterIPs"][0] == first
    assert both["ipFamilies"] == ["IPv4", "IPv6"]
    one = services.patch("a", {"spec": {"ipFamilyPolicy": "SingleStack"}})["spec"]
    assert (one["clusterIPs"], one["ipFamilies"]) == ([first], ["IPv4"])


def test_node_ports(registry):
    services = Api(registry, "Service")
    dns = [{"name": n, "port": 53, "protocol": p} for n, p in (("u", "UDP"), ("t", "TCP"))]
    both = services.create("dns", {"type": "NodePort", "ports": dns})["spec"]["ports"]
    assert both[0]["nodePort"] == both[1]["nodePort"], "one number for both protocols"
    with pytest.raises(StatusError, match="provided port is already allocated"):
        services.create("b", {"type": "NodePort",
                              "ports": [{"port": 1, "nodePort": both[0]["nodePort"]}]})  # fmt: skip
    with pytest.raises(StatusError, match="The range of valid ports is 30000-30010"):
        services.create("b", {"type": "NodePort", "ports": [{"port": 1, "nodePort": 80}]})
    local = services.create(
        "lb",
        {"type": "LoadBalancer", "ports": [{"port": 1}], "externalTrafficPolicy": "Local"},
    )["spec"]
    assert 30000 <= local["healthCheckNodePort"] <= 30010
    plain = services.patch("lb", {"spec": {"type": "ClusterIP"}})["spec"]
    assert "healthCheckNodePort" not in plain
    assert "nodePort" not in plain["ports"][0]
    freed = [{"port": 1, "nodePort": local["healthCheckNodePort"]}]
    services.create("c", {"type": "NodePort", "ports": freed})


def test_a_dry_run_takes_nothing(registry):
    resource = registry.resource("Service")
    body = {"metadata": {"name": "a"}, "spec": {"ports": [{"port": 80}], "clusterIP": "10.96.0.50"}}
    registry.create(resource, "default", dict(body, metadata={"name": "a"}), dry_run=True)
    assert registry.find(resource, "default", "a") is None
    registry.create(resource, "default", body)


def test_external_names_have_no_address(registry):
    services = Api(registry, "Service")
    made = services.create("a", {"type": "ExternalName", "externalName": "example.com"})["spec"]
    assert not made.get("clusterIP")
    plain = services.patch("a", {"spec": {"type": "ClusterIP", "ports": [{"port": 80}],
                                          "externalName": None}})["spec"]  # fmt: skip
    assert plain["clusterIP"].startswith("10.96.")
    back = services.patch("a", {"spec": {"type": "ExternalName", "externalName": "b.example"}})
    assert not back["spec"].get("clusterIPs")


# --- bad bodies ----------------------------------------------------------------------------------


def test_wrong_types_are_named(registry):
    services = Api(registry, "Service")
    with pytest.raises(StatusError, match=r"\$.spec.ports\[0\].port") as error:
        services.create("a", {"ports": [{"port": "eighty"}]})
    assert error.value.status == 400
    with pytest.raises(StatusError, match="spec must be an object"):
        registry.create(services.resource, "default", {"metadata": {"name": "a"}, "spec": []})


def test_nulls_are_as_good_as_absent(registry):
    services = Api(registry, "Service")
    made = services.create("a", {"ports": [{"port": 80, "name": None}], "selector": None})
    assert "selector" not in made["spec"]
    assert "name" not in made["spec"]["ports"][0]


# --- many manifests at once ----------------------------------------------------------------------


def test_apply_all_says_what_became_of_each(registry):
    manifests = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "namespace": "late"}},
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "late"}},
        {"apiVersion": "example.com/v1", "kind": "Gateway", "metadata": {"name": "g"}},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "bad"}, "spec": {"ports": []}},
        {"kind": "Service", "metadata": {"name": "x"}},
        {"apiVersion": "v1", "kind": "Pod"},
    ]
    results = apply_all(registry, [dict(one) for one in manifests])
    verbs = [(one["verb"], one["known"]) for one in results]
    assert verbs[:4] == [
        ("created", True),
        ("created", True),
        ("created", False),
        ("failed", True),
    ]
    assert "spec.ports: Required value" in results[3]["error"]
    assert "apiVersion" in results[4]["error"]
    assert "metadata" in results[5]["error"]
    gateways = registry.catalogue.at("example.com", "v1", "gateways")
    assert gateways
    assert registry.get(gateways, "default", "g")
    again = apply_all(registry, [dict(one) for one in manifests[:3]])
    assert [one["verb"] for one in again] == ["unchanged"] * 3
    gone = delete_all(registry, manifests[:3])
    assert [one["verb"] for one in gone] == ["deleted"] * 3
    assert [one["verb"] for one in delete_all(registry, manifests[2:3])] == ["absent"]


def test_definitions_make_and_unmake_resources(registry):
    definition = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "ships.example.com"},
        "spec": {
            "group": "example.com",
            "scope": "Cluster",
            "names": {"plural": "ships", "kind": "Ship"},
            "versions": [{"name": "v1", "served": True, "subresources": {"status": {}}}],
        },
    }
    apply_all(registry, [definition])
    ships = registry.catalogue.of("example.com/v1", "Ship")
    assert ships
    assert (ships.namespaced, ships.has_status) == (False, True)
    delete_all(registry, [definition])
    assert registry.catalogue.of("example.com/v1", "Ship") is None
