"""Errors as the API server words them: one exception that is a `Status` object."""

from __future__ import annotations

from typing import Any

from podwire.errors import ApiError
from podwire.kube.objects import Json
from podwire.lab.api.resources import ApiResource


class StatusError(ApiError):
    """An answer other than success. `details` and `causes` are as in meta/v1 Status."""

    def __init__(
        self, code: int, reason: str, message: str, *, details: Json | None = None
    ) -> None:
        super().__init__(message, status=code, reason=reason)
        self.details = details

    def body(self) -> Json:
        """The Status object."""
        out: Json = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": str(self),
            "reason": self.reason,
            "code": self.status,
        }
        if self.details is not None:
            out["details"] = self.details
        return out


def _subject(resource: ApiResource, name: str) -> tuple[str, Json]:
    qualified = f"{resource.plural}.{resource.group}" if resource.group else resource.plural
    details: Json = {"name": name, "kind": resource.plural}
    if resource.group:
        details["group"] = resource.group
    return f'{qualified} "{name}"', details


def not_found(resource: ApiResource, name: str) -> StatusError:
    subject, details = _subject(resource, name)
    return StatusError(404, "NotFound", f"{subject} not found", details=details)


def already_exists(resource: ApiResource, name: str) -> StatusError:
    subject, details = _subject(resource, name)
    return StatusError(409, "AlreadyExists", f"{subject} already exists", details=details)


def conflict(
    resource: ApiResource,
    name: str,
    why: str = "the object has been modified; please apply your changes to the latest version "
    "and try again",
) -> StatusError:
    subject, details = _subject(resource, name)
    message = f"Operation cannot be fulfilled on {subject}: {why}"
    return StatusError(409, "Conflict", message, details=details)


def forbidden(resource: ApiResource, name: str, why: str) -> StatusError:
    subject, details = _subject(resource, name)
    return StatusError(403, "Forbidden", f"{subject} is forbidden: {why}", details=details)


def bad_request(message: str) -> StatusError:
    return StatusError(400, "BadRequest", message)


def expired(message: str) -> StatusError:
    return StatusError(410, "Expired", message)


def unsupported_media(message: str) -> StatusError:
    return StatusError(415, "UnsupportedMediaType", message)


def no_such_path() -> StatusError:
    return StatusError(404, "NotFound", "the server could not find the requested resource")


def invalid(resource: ApiResource, name: str, problems: list[Any]) -> StatusError:
    """422 with one cause per `FieldError`."""
    qualified = f"{resource.kind}.{resource.group}" if resource.group else resource.kind
    texts = [str(problem) for problem in problems]
    joined = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    details: Json = {
        "name": name,
        "kind": resource.kind,
        "causes": [
            {"reason": problem.reason, "message": problem.message, "field": problem.field}
            for problem in problems
        ],
    }
    if resource.group:
        details["group"] = resource.group
    return StatusError(
        422, "Invalid", f'{qualified} "{name}" is invalid: {joined}', details=details
    )
