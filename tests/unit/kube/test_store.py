from hypothesis import given
from hypothesis import strategies as st

from podwire.kube.objects import Metadata, Namespace, Node, Pod
from podwire.kube.store import Change, Store


def pod(name: str, version: str = "", uid: str = "u", **labels: str) -> Pod:
    return Pod(
        metadata=Metadata(
            name=name, namespace="ns", uid=uid, resource_version=version, labels=labels
        )
    )


def test_changes_are_coalesced_from_the_last_take():
    store = Store()
    store.put(pod("a", "1"))
    store.put(pod("a", "2"))
    store.put(pod("b", "3"))
    store.remove(Pod, ("ns", "b"))
    assert store.take().of(Pod) == {("ns", "a"): Change(None, pod("a", "2"))}
    store.put(pod("a", "4"))
    store.remove(Pod, ("ns", "a"))
    assert store.take().of(Pod) == {("ns", "a"): Change(pod("a", "2"), None)}
    assert not store.take()


def test_the_same_resource_version_is_no_change():
    store = Store()
    store.put(pod("a", "1"))
    store.take()
    store.put(pod("a", "1"))
    assert not store.take()
    store.put(pod("a", "1", uid="another"))
    assert len(store.take()) == 1


def test_objects_without_version_are_compared_whole():
    store = Store()
    store.put(pod("a"))
    store.take()
    store.put(pod("a"))
    assert not store.take()
    store.put(pod("a", app="x"))
    assert len(store.take()) == 1


def test_replace_removes_what_is_no_longer_there_and_only_of_its_kind():
    store = Store()
    store.put(Namespace(metadata=Metadata(name="ns")))
    store.replace(Pod, [pod("a", "1"), pod("b", "2")])
    store.take()
    store.replace(Pod, [pod("b", "2"), pod("c", "3")])
    changes = store.take()
    assert changes.of(Pod) == {
        ("ns", "a"): Change(pod("a", "1"), None),
        ("ns", "c"): Change(None, pod("c", "3")),
    }
    assert list(changes) == [Pod]
    assert store.get(Namespace, ("", "ns")) is not None
    assert store.get(Node, ("", "none")) is None
    assert changes.of(Node) == {}


def test_what_does_not_decode_is_set_aside_until_it_changes():
    store = Store()
    store.put(pod("a", "1"))
    store.take()
    store.replace(Pod, [pod("b", "2")], {("ns", "a"): "bad port", ("ns", "c"): "bad label"})
    assert store.set_aside == {
        (Pod, ("ns", "a")): "bad port",
        (Pod, ("ns", "c")): "bad label",
    }
    assert store.get(Pod, ("ns", "a")) == pod("a", "1")  # the last good version stays
    store.put(pod("a", "3"))
    store.remove(Pod, ("ns", "c"))
    assert not store.set_aside
    store.refuse(Pod, ("ns", "d"), "bad")
    store.replace(Pod, [])
    assert not store.set_aside


steps = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.booleans()), max_size=20)


@given(steps)
def test_replaying_the_change_sets_gives_the_store(history):
    """apply(diff) = new, whenever the changes are taken."""
    store = Store()
    mirror: dict = {}
    for name, version, take in history:
        if version:
            store.put(pod(name, str(version)))
        else:
            store.remove(Pod, ("ns", name))
        if take:
            _replay(store, mirror)
    _replay(store, mirror)
    assert mirror == dict(store.all(Pod))


def _replay(store: Store, mirror: dict) -> None:
    for key, change in store.take().of(Pod).items():
        assert mirror.get(key) == change.old
        if change.new is None:
            del mirror[key]
        else:
            mirror[key] = change.new
