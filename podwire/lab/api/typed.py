"""Whether the fields that our agents read have the types that the API gives them."""

from __future__ import annotations

import msgspec

from podwire.kube import objects
from podwire.kube.objects import Json, Resource
from podwire.lab.api.resources import ApiResource
from podwire.lab.api.status import bad_request

_TYPES: dict[str, type[Resource]] = {
    kind.__name__: kind
    for kind in (
        objects.Namespace,
        objects.Node,
        objects.Pod,
        objects.Service,
        objects.EndpointSlice,
        objects.NetworkPolicy,
        objects.ServiceCIDR,
    )
}


def prune_nulls(value: Json) -> None:
    """Drop null members in place: to the API, null and absent are the same."""
    for key in [key for key, member in value.items() if member is None]:
        del value[key]
    for member in value.values():
        if isinstance(member, dict):
            prune_nulls(member)  # pyright: ignore[reportUnknownArgumentType]
        elif isinstance(member, list):
            for item in member:  # pyright: ignore[reportUnknownVariableType]
                if isinstance(item, dict):
                    prune_nulls(item)  # pyright: ignore[reportUnknownArgumentType]


def check_types(resource: ApiResource, obj: Json) -> None:
    """Raises StatusError (400), as the real server does when a body does not decode."""
    prune_nulls(obj)
    kind = _TYPES.get(resource.kind)
    for part in ("spec", "status"):
        if not isinstance(obj.get(part, {}), dict):
            raise bad_request(
                f'{resource.kind} in version "{resource.version}" cannot be handled as a '
                f"{resource.kind}: {part} must be an object"
            )
    if kind is None:
        return
    try:
        msgspec.convert(obj, kind)
    except msgspec.ValidationError as error:
        raise bad_request(
            f'{resource.kind} in version "{resource.version}" cannot be handled as a '
            f"{resource.kind}: {error}"
        ) from None
