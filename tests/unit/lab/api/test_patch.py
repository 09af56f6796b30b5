import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.lab.api.apply import apply, fields_of
from podwire.lab.api.merge_keys import schema_of
from podwire.lab.api.patch import json_patch, merge_patch, strategic_merge
from podwire.lab.api.status import StatusError

POD = schema_of("Pod", builtin=True)
SERVICE = schema_of("Service", builtin=True)


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ([{"op": "add", "path": "/a", "value": 2}], {"a": 2, "l": [1, 2], "m/n": 0}),
        ([{"op": "add", "path": "/l/0", "value": 0}], {"a": 1, "l": [0, 1, 2], "m/n": 0}),
        ([{"op": "add", "path": "/l/-", "value": 3}], {"a": 1, "l": [1, 2, 3], "m/n": 0}),
        ([{"op": "remove", "path": "/l/0"}], {"a": 1, "l": [2], "m/n": 0}),
        ([{"op": "replace", "path": "/m~1n", "value": 5}], {"a": 1, "l": [1, 2], "m/n": 5}),
        ([{"op": "move", "from": "/a", "path": "/b"}], {"b": 1, "l": [1, 2], "m/n": 0}),
        ([{"op": "copy", "from": "/l", "path": "/a"}], {"a": [1, 2], "l": [1, 2], "m/n": 0}),
        ([{"op": "test", "path": "/a", "value": 1}], {"a": 1, "l": [1, 2], "m/n": 0}),
    ],
)
def test_json_patch(operations, expected):
    obj = {"a": 1, "l": [1, 2], "m/n": 0}
    before = copy.deepcopy(obj)
    assert json_patch(obj, operations) == expected
    assert obj == before


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "test", "path": "/a", "value": 2},
        {"op": "remove", "path": "/none"},
        {"op": "replace", "path": "/none", "value": 1},
        {"op": "add", "path": "/l/9", "value": 1},
        {"op": "add", "path": "a", "value": 1},
        {"op": "dance", "path": "/a"},
        {"op": "add", "path": "/a"},
        {},
    ],
)
def test_a_json_patch_that_does_not_fit(operation):
    with pytest.raises(StatusError) as refused:
        json_patch({"a": 1, "l": []}, [operation])
    assert refused.value.status == 422


def test_merge_patch_is_rfc_7386():
    obj = {"title": "hi", "author": {"given": "J", "family": "D"}, "tags": ["a", "b"]}
    patch = {"title": "ho", "author": {"family": None}, "tags": ["c"], "new": {"x": None}}
    assert merge_patch(obj, patch) == {
        "title": "ho",
        "author": {"given": "J"},
        "tags": ["c"],
        "new": {},
    }


def ports(*numbers: int, **extra) -> dict:
    return {"spec": {"ports": [{"port": n, **extra} for n in numbers]}}


def test_strategic_merge_knows_the_items_of_lists():
    obj = {"spec": {"ports": [{"port": 80, "nodePort": 30001}, {"port": 81}]}}
    assert strategic_merge(obj, ports(80, name="http"), SERVICE) == {
        "spec": {"ports": [{"port": 80, "nodePort": 30001, "name": "http"}, {"port": 81}]}
    }
    gone = {"spec": {"ports": [{"port": 80, "$patch": "delete"}]}}
    assert strategic_merge(obj, gone, SERVICE) == ports(81)
    instead = {"spec": {"ports": [{"port": 99}, {"$patch": "replace"}]}}
    assert strategic_merge(obj, instead, SERVICE) == ports(99)


def test_strategic_merge_order_sets_and_kept_keys():
    obj = {"spec": {"containers": [{"name": "a"}, {"name": "b"}], "tolerations": [{"key": "x"}]}}
    patch = {
        "spec": {
            "$setElementOrder/containers": [{"name": "c"}, {"name": "b"}, {"name": "a"}],
            "containers": [{"name": "c", "image": "i"}],
            "tolerations": [{"key": "y"}],
        }
    }
    spec = strategic_merge(obj, patch, POD)["spec"]
    assert [c["name"] for c in spec["containers"]] == ["c", "b", "a"]
    assert spec["tolerations"] == [{"key": "y"}], "a list without keys is replaced"
    obj = {"metadata": {"finalizers": ["a", "b"]}}
    patch = {"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"], "finalizers": ["c"]}}
    assert strategic_merge(obj, patch, POD) == {"metadata": {"finalizers": ["b", "c"]}}
    obj = {"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}}
    patch = {"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}
    assert strategic_merge(obj, patch, {}) == {"spec": {"strategy": {"type": "Recreate"}}}
    with pytest.raises(StatusError, match="merge key"):
        strategic_merge({}, {"spec": {"ports": [{"name": "x"}]}}, SERVICE)


keys = st.text(max_size=2).filter(lambda key: not key.startswith("$"))  # those are directives
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner),
    max_leaves=8,
)
objects = st.dictionaries(st.sampled_from("abc"), json_values, max_size=3)


@given(objects, objects)
def test_without_keys_strategic_merge_is_merge_patch(obj, patch):
    assert strategic_merge(obj, patch, {}) == merge_patch(obj, patch)


@given(objects, objects)
def test_a_merge_patch_applied_again_changes_nothing(obj, patch):
    once = merge_patch(obj, patch)
    assert merge_patch(once, patch) == once


# --- server-side apply ---------------------------------------------------------------------------


def manifest(**spec) -> dict:
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": spec}


def test_apply_removes_what_its_manager_gave_up_and_nothing_else():
    first = manifest(
        ports=[{"port": 80}, {"port": 81}], selector={"a": "1", "b": "2"}, type="NodePort"
    )
    stored = apply({}, first, SERVICE, "me", "t1")
    stored["spec"]["clusterIP"] = "10.96.0.1"  # from the server
    stored["spec"]["ports"][0]["nodePort"] = 30000
    second = manifest(ports=[{"port": 80}], selector={"a": "1"})
    now = apply(stored, second, SERVICE, "me", "t2")
    assert now["spec"] == {
        "ports": [{"port": 80, "nodePort": 30000}],
        "selector": {"a": "1"},
        "clusterIP": "10.96.0.1",
    }
    assert [entry["time"] for entry in now["metadata"]["managedFields"]] == ["t2"]


def test_what_another_manager_owns_too_stays():
    stored = apply({}, manifest(selector={"a": "1"}, type="NodePort"), SERVICE, "me", "t")
    stored = apply(stored, manifest(type="NodePort"), SERVICE, "other", "t")
    stored = apply(stored, manifest(selector={"a": "1"}), SERVICE, "me", "t")
    assert stored["spec"] == {"selector": {"a": "1"}, "type": "NodePort"}
    managers = [entry["manager"] for entry in stored["metadata"]["managedFields"]]
    assert managers == ["other", "me"]


def test_fields_are_in_the_apis_form():
    found = fields_of(manifest(ports=[{"port": 80, "name": "http"}], selector={"a": "1"}), SERVICE)
    assert found == {
        "f:spec": {
            "f:ports": {'k:{"port":80,"protocol":"TCP"}': {".": {}, "f:name": {}, "f:port": {}}},
            "f:selector": {"f:a": {}},
        }
    }


@given(objects, objects, objects)
def test_applying_again_changes_nothing(current, first, second):
    stored = apply(apply(current, first, {}, "me", "t"), second, {}, "me", "t")
    assert apply(stored, second, {}, "me", "t") == stored
