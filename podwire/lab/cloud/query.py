"""The EC2 Query protocol on the wire, driven by botocore's own description of the service.

Requests are forms (``Filter.1.Value.2=x``), answers XML. The names come from the service model
(`queryName`, `locationName`), so that what boto3 sends is what is read and what it expects is sent.
Source: https://smithy.io/2.0/aws/protocols/aws-ec2-query-protocol.html
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import cache
from typing import Any
from xml.sax.saxutils import escape

from podwire.lab.cloud.faults import Ec2Error

VERSION = "2016-11-15"
NAMESPACE = f"http://ec2.amazonaws.com/doc/{VERSION}/"


def decode(form: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """The operation's name and its parameters in boto3's shape. Raises Ec2Error."""
    operation = form.get("Action", "")
    shape = _service().operation_model_or_none(operation)
    if shape is None:
        raise Ec2Error("InvalidAction", f"The action {operation} is not valid for this service")
    if shape.input_shape is None:
        return operation, {}
    tree: dict[str, Any] = {}
    for key, value in form.items():
        branch = tree
        *path, leaf = key.split(".")
        for part in path:
            branch = branch.setdefault(part, {})
        branch[leaf] = value
    return operation, _read(shape.input_shape, tree)


def encode(operation: str, answer: Mapping[str, Any], request_id: str) -> str:
    """The answer as XML."""
    shape = _service().operation_model_or_none(operation)
    body = _write_members(shape.output_shape, answer) if shape and shape.output_shape else ""
    if not body:
        body = "<return>true</return>"
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<{operation}Response xmlns="{NAMESPACE}">'
        f"<requestId>{request_id}</requestId>{body}</{operation}Response>"
    )


def encode_error(error: Ec2Error, request_id: str) -> str:
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<Response><Errors><Error>'
        f"<Code>{escape(error.code)}</Code><Message>{escape(str(error))}</Message>"
        f"</Error></Errors><RequestID>{request_id}</RequestID></Response>"
    )


class _Service:
    """botocore's model of EC2; it loads in about a third of a second, once."""

    def __init__(self) -> None:
        import botocore.loaders
        import botocore.model

        description = botocore.loaders.Loader().load_service_model("ec2", "service-2", VERSION)
        self._model: Any = botocore.model.ServiceModel(description, "ec2")
        self._names = frozenset(self._model.operation_names)

    def operation_model_or_none(self, name: str) -> Any:
        return self._model.operation_model(name) if name in self._names else None


@cache
def _service() -> _Service:
    return _Service()


def _query_name(name: str, shape: Any) -> str:
    serialization = shape.serialization
    if "queryName" in serialization:
        return serialization["queryName"]
    location: str = serialization.get("name", name)
    return location[0].upper() + location[1:]


def _read(shape: Any, tree: Any) -> Any:
    kind: str = shape.type_name
    if kind == "structure":
        members = ((name, member, _query_name(name, member)) for name, member in _members(shape))
        return {name: _read(member, tree[key]) for name, member, key in members if key in tree}
    if kind == "list":
        items = sorted(tree.items(), key=lambda item: int(item[0]))
        return [_read(shape.member, item) for _, item in items]
    try:
        if kind in ("integer", "long"):
            return int(tree)
        if kind in ("float", "double"):
            return float(tree)
    except ValueError:
        raise Ec2Error("InvalidParameterValue", f"{tree!r} is not a number") from None
    return tree.lower() == "true" if kind == "boolean" else tree


def _members(shape: Any) -> list[tuple[str, Any]]:
    return list(shape.members.items())


def _write(shape: Any, tag: str, value: Any) -> str:
    kind: str = shape.type_name
    if kind == "structure":
        return f"<{tag}>{_write_members(shape, value)}</{tag}>"
    if kind == "list":
        item: str = shape.member.serialization.get("name", "item")
        return f"<{tag}>{''.join(_write(shape.member, item, one) for one in value)}</{tag}>"
    if kind == "boolean":
        text = "true" if value else "false"
    elif isinstance(value, datetime):
        text = value.strftime("%Y-%m-%dT%H:%M:%S.000Z")
    else:
        text = escape(str(value))
    return f"<{tag}>{text}</{tag}>"


def _write_members(shape: Any, answer: Mapping[str, Any]) -> str:
    return "".join(
        _write(member, member.serialization.get("name", name), answer[name])
        for name, member in _members(shape)
        if name in answer
    )
