import pytest

from podwire.lab.api.resources import Catalogue
from podwire.lab.api.selectors import label_selector, parse_fields, parse_labels
from podwire.lab.api.status import StatusError

LABELS = {"app": "web", "tier": "front", "example.com/x": "1", "empty": ""}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("", True),
        ("app=web", True),
        ("app==web", True),
        ("app = web", True),
        ("app!=web", False),
        ("other!=web", True),
        ("app in (web, db)", True),
        ("app notin (web,db)", False),
        ("other notin (a)", True),
        ("app", True),
        ("!app", False),
        ("!other", True),
        ("app=web,tier in (front,back),!other", True),
        ("app=web,tier=back", False),
        ("example.com/x=1", True),
        ("empty=", True),
    ],
)
def test_labels(text, matches):
    assert parse_labels(text)(LABELS) is matches


@pytest.mark.parametrize("text", ["=a", "a b", "a in b", "a in (b", "(", "a=b=c d"])
def test_what_is_no_label_selector(text):
    with pytest.raises(StatusError) as refused:
        parse_labels(text)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("selector", "matches"),
    [
        (None, False),
        ({}, True),
        ({"matchLabels": {"app": "web"}}, True),
        ({"matchLabels": {"app": "db"}}, False),
        ({"matchExpressions": [{"key": "app", "operator": "In", "values": ["web"]}]}, True),
        ({"matchExpressions": [{"key": "b", "operator": "NotIn", "values": ["x"]}]}, True),
        ({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}, False),
    ],
)
def test_label_selector(selector, matches):
    assert label_selector(selector)(LABELS) is matches


def test_fields():
    pods = Catalogue().of("v1", "Pod")
    assert pods
    pod = {"metadata": {"name": "p"}, "spec": {"nodeName": "n"}, "status": {"phase": "Running"}}
    assert parse_fields(pods, "spec.nodeName=n,status.phase!=Failed")(pod)
    assert not parse_fields(pods, "spec.nodeName=")(pod)
    assert parse_fields(pods, "metadata.name==p")(pod)
    with pytest.raises(StatusError, match=r"not supported: spec\.volumes"):
        parse_fields(pods, "spec.volumes=1")
