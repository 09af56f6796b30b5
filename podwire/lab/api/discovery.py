"""What clients ask before they start: groups, resources, version, health."""

from __future__ import annotations

from collections.abc import Iterable

from podwire.kube.objects import Json
from podwire.lab.api import openapi
from podwire.lab.api.resources import ApiResource, Catalogue
from podwire.lab.api.storage import encode

_JSON = "application/json"
_VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]


class Discovery:
    """Answers for everything under no resource: `answer` gives content type and body."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def answer(self, parts: list[str], accept: str) -> tuple[str, bytes] | None:
        """None when there is nothing at this path."""
        match parts:
            case [""]:
                return _JSON, encode({"paths": ["/api", "/apis", "/healthz", "/version"]})
            case ["healthz" | "livez" | "readyz", *_]:
                return "text/plain", b"ok"
            case ["version"]:
                return _JSON, encode(openapi.VERSION)
            case ["openapi", "v2"]:
                return openapi.version_2(self._catalogue, accept)
            case ["openapi", "v3", *rest]:
                found = openapi.version_3(self._catalogue, rest)
            case ["api"]:
                found = {"kind": "APIVersions", "versions": ["v1"]}
            case ["api", "v1"]:
                found = self._resources("", "v1")
            case ["apis"]:
                groups = [self._group(name) for name in self._catalogue.groups()]
                found = {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
            case ["apis", group] if group in self._catalogue.groups():
                found = {"kind": "APIGroup", "apiVersion": "v1", **self._group(group)}
            case ["apis", group, version]:
                found = self._resources(group, version)
            case _:
                return None
        return None if found is None else (_JSON, encode(found))

    def _group(self, name: str) -> Json:
        versions = [
            {"groupVersion": f"{name}/{version}", "version": version}
            for version in self._catalogue.groups()[name]
        ]
        return {"name": name, "versions": versions, "preferredVersion": versions[0]}

    def _resources(self, group: str, version: str) -> Json | None:
        found = [r for r in self._catalogue if (r.group, r.version) == (group, version)]
        if not found:
            return None
        return {
            "kind": "APIResourceList",
            "apiVersion": "v1",
            "groupVersion": f"{group}/{version}" if group else version,
            "resources": [entry for resource in found for entry in _entries(resource)],
        }


def _entries(resource: ApiResource) -> Iterable[Json]:
    entry: Json = {
        "name": resource.plural,
        "singularName": resource.kind.lower(),
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": _VERBS,
    }
    if resource.short_names:
        entry["shortNames"] = list(resource.short_names)
    if resource.categories:
        entry["categories"] = list(resource.categories)
    yield entry
    for name, kind, given in (
        ("status", resource.kind, resource.has_status),
        ("scale", "Scale", resource.has_scale),
    ):
        if given:
            below: Json = {
                "name": f"{resource.plural}/{name}",
                "singularName": "",
                "namespaced": resource.namespaced,
                "kind": kind,
                "verbs": ["get", "patch", "update"],
            }
            if name == "scale":
                below.update(group="autoscaling", version="v1")
            yield below
