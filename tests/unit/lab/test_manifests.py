"""Manifests in, objects or one clear error out."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from podwire.errors import ConfigError
from podwire.lab import manifests


def pod(name: str) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}}


def test_documents_lists_and_comments_become_objects_in_order() -> None:
    text = "\n---\n".join(
        (
            "# only a comment",
            json.dumps(pod("a")),
            yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": [pod("b"), pod("c")]}),
            "",
        )
    )
    found = manifests.parse(text, "f.yaml")
    assert [str(m) for m in found] == ["Pod a", "Pod b", "Pod c"]
    assert [m.document for m in found] == [1, 2, 2]


def test_namespaces_come_first_whatever_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(json.dumps(pod("a")))
    (tmp_path / "b.yml").write_text("{apiVersion: v1, kind: Namespace, metadata: {name: n}}")
    (tmp_path / "README.md").write_text("no manifest")
    assert [m.kind for m in manifests.read([str(tmp_path)])] == ["Namespace", "Pod"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: b", "document 1: not a Kubernetes object: apiVersion is missing"),
        ("[1, 2]", "document 1: not a Kubernetes object but a list"),
        (f"{json.dumps(pod('a'))}\n---\n{{a: [}}", "document 2: line 3, column 6:"),
        (f"{json.dumps(pod('a'))}\n---\nkind: Pod\napiVersion: v1", "document 2: Pod: metadata"),
        ("{apiVersion: v1, kind: Pod, metadata: {}}", "document 1: Pod: metadata.name is missing"),
        ("{apiVersion: v1, kind: PodList, items: 3}", "items of a PodList is not a list"),
        ("{apiVersion: v1, kind: List, items: [7]}", "not a Kubernetes object but a number"),
        ("a: 2026-99-99", "document 1: "),
    ],
)
def test_a_malformed_document_is_named(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"^f\.yaml, ") as caught:
        manifests.parse(text, "f.yaml")
    assert says in str(caught.value)


def test_missing_files_and_empty_directories_are_errors(tmp_path: Path) -> None:
    for source in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=str(source)):
            manifests.read([str(source)])


@given(st.text() | st.binary().map(lambda data: data.decode("latin-1")))
def test_any_text_gives_objects_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert all(m.obj["kind"] for m in manifests.parse(text, "f"))
