"""The README says what the committed results say."""

from __future__ import annotations

import pytest

from benchmarks import readme


def test_the_readme_is_in_step_with_the_results():
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.render(text) == text, "run python -m benchmarks.readme"


def test_a_missing_section_is_named():
    with pytest.raises(ValueError, match="recsys_quality"):
        readme.render("no sections here")
