"""Every given service-proxy case, on the evaluator."""

from __future__ import annotations

import pytest

from tests.conformance import SHARED_CASES
from tests.conformance.service_cases import load
from tests.conformance.service_model import Model
from tests.conformance.service_proxy import check

FOLDER = SHARED_CASES / "service-proxy"


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the cases are not at {FOLDER}")
def test_the_evaluator_passes_every_given_case() -> None:
    results = [check(name, case, Model()) for name, case in load(FOLDER)]
    assert results
    assert [result for result in results if result.outcome != "passed"] == []
