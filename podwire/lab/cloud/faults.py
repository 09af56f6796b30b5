"""What can go wrong between a client and EC2, on purpose and repeatably."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from podwire.errors import PodwireError


class Ec2Error(PodwireError):
    """An answer of EC2 that is an error. `code` as in EC2's list of error codes."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    @property
    def status(self) -> int:
        """The HTTP status EC2 sends with it."""
        if self.code in ("RequestLimitExceeded", "Unavailable", "ServiceUnavailable"):
            return 503
        if self.code in ("AuthFailure", "UnauthorizedOperation", "MissingAuthenticationToken"):
            return 403
        return 500 if self.code == "InternalError" else 400


class AnswerLost(PodwireError):
    """The request was carried out and the answer never arrives: the connection breaks."""


@dataclass
class Fault:
    """One way to fail. `operations` is a pattern (``Assign*``); `times` None means for ever."""

    operations: str = "*"
    code: str = ""
    message: str = "injected"
    delay_s: float = 0.0
    lose_answer: bool = False
    probability: float = 1.0
    times: int | None = None


@dataclass
class TokenBucket:
    """EC2's request throttling: `rate` requests a second on average, `burst` at once."""

    rate: float
    burst: float
    tokens: float = field(init=False)
    filled_at: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = self.burst

    def take(self, now: float) -> bool:
        self.tokens = min(self.burst, self.tokens + (now - self.filled_at) * self.rate)
        self.filled_at = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


@dataclass
class Outcome:
    """What shall happen to one request."""

    delay_s: float = 0.0
    error: Ec2Error | None = None
    lose_answer: bool = False


class Faults:
    """The faults in force. All randomness comes from `random`."""

    def __init__(self, clock: Callable[[], float], random: random.Random | None = None) -> None:
        self.latency_s = 0.0
        self.active: list[Fault] = []
        self.bucket: TokenBucket | None = None
        self._clock = clock
        self._random = random or _default_random()

    def add(self, fault: Fault) -> Fault:
        self.active.append(fault)
        return fault

    def clear(self) -> None:
        self.active.clear()
        self.bucket = None

    def outcome(self, operation: str) -> Outcome:
        """Roll the dice for one request."""
        outcome = Outcome(delay_s=self.latency_s)
        if self.bucket is not None and not self.bucket.take(self._clock()):
            outcome.error = Ec2Error("RequestLimitExceeded", "Request limit exceeded.")
            return outcome
        for fault in list(self.active):
            if not fnmatch.fnmatchcase(operation, fault.operations):
                continue
            if self._random.random() >= fault.probability:
                continue
            if fault.times is not None:
                fault.times -= 1
                if fault.times <= 0:
                    self.active.remove(fault)
            outcome.delay_s += fault.delay_s
            outcome.lose_answer |= fault.lose_answer
            if fault.code:
                outcome.error = Ec2Error(fault.code, fault.message)
                break
        return outcome


def _default_random() -> random.Random:
    return random.Random(0)
