"""The project's own CNI cases, and the shared ones where they are."""

import pytest

from tests.conformance import OWN_CASES, SHARED_CASES, cni

FOLDERS = (OWN_CASES / "cni", SHARED_CASES / "cni")
FILES = [path for folder in FOLDERS for path in sorted(folder.glob("*.yaml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_case(path):
    result = cni.run_file(path)
    if result.outcome == "skipped":
        pytest.skip(result.detail)
    assert result.outcome == "passed", result.detail
