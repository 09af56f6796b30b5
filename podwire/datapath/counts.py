"""What data paths count of policies and Services, for people who ask; each part as it can."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from podwire.policy import Direction, PolicyRef, Verdict
from podwire.services import Backend, Frontend, ServicePort


class PolicyCount(NamedTuple):
    """First packets of connections judged for one reason; `policies`: whose doing it is."""

    verdict: Verdict
    direction: Direction
    policies: tuple[PolicyRef, ...]
    packets: int


@runtime_checkable
class CountsPolicies(Protocol):
    """A part that knows how often each reason decided, most packets first."""

    def counts(self) -> list[PolicyCount]: ...


class ServiceCounts(NamedTuple):
    """Of one Service port."""

    frontends: Mapping[Frontend, tuple[str, int | None]] = {}
    """What in the kernel decides, in words, and new connections seen; None: not counted."""
    backends: Mapping[Backend, int] = {}
    """New connections that each was chosen for; empty where that is not counted."""


@runtime_checkable
class CountsServices(Protocol):
    """A part that counts what Services do. May list maps: not for every sync."""

    def counts(self, port: ServicePort) -> ServiceCounts: ...
