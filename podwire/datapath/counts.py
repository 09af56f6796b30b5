"""What data paths count of policies and Services, for people who ask; each part as it can."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from podwire.policy import Direction, PolicyRef, Verdict
from podwire.services import Frontend, ServicePort


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


@runtime_checkable
class CountsServices(Protocol):
    """A part that knows, for each frontend of a port, what in the kernel decides about it, in
    words, and how many connections it has seen. May list maps: not for every sync.
    """

    def counts(self, port: ServicePort) -> Mapping[Frontend, tuple[str, int]]: ...
