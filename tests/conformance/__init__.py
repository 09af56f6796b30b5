"""Cases as data, run against the real thing: `python -m tests.conformance --suite cni`.

A suite is a module of this package with `run(cases_dir, datapath) -> Iterable[CaseResult]`
(``service-proxy`` is `service_proxy`). It yields each case's result as soon as it has it, and
leaves nothing behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

REPOSITORY = Path(__file__).resolve().parents[2]
OWN_CASES = Path(__file__).with_name("cases")
MEANING_CASES = OWN_CASES / "meaning"
"""Many small ones about what objects mean, asked of the evaluator alone."""
SHARED_CASES = REPOSITORY.parent / "shared" / "conformance"


@dataclass(frozen=True)
class CaseResult:
    """What one case came to. `detail` says why it failed or was skipped, in one line or more."""

    case: str
    outcome: Literal["passed", "failed", "skipped"]
    detail: str = ""
