"""The golden tensors, where they are at hand; see tests/golden.py."""

from pathlib import Path

import golden  # noqa: F401  (registers the cases)
import golden_form
import pytest

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
FILES = sorted(GOLDEN.glob("*.safetensors"))


@pytest.mark.skipif(not FILES, reason=f"GOLDEN TENSORS NOT FOUND at {GOLDEN}: nothing is compared with the reference")
@pytest.mark.parametrize("path", [p for p in FILES if golden_form.case_of(p.stem)], ids=lambda p: p.stem)
def test_agrees_with_the_reference(path):
    results = list(golden_form.run(path, GOLDEN.parent / "data"))
    assert results
    assert [r for r in results if isinstance(r, str) or not r.ok] == []
