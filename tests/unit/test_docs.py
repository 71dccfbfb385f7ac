"""The tests, files and pages that the docs refer to exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/*/*.md")]
)
TESTS = {
    name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)\(", file.read_text())
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tests_and_files_that_a_page_names_exist(page):
    text = page.read_text()
    assert set(re.findall(r"`(test_\w{12,})`", text)) <= TESTS
    files = {ROOT / path for path in re.findall(r"`(tests/[\w/]+\.py)`", text)}
    files |= {page.parent / path for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", text)}
    assert [str(file) for file in files if not file.exists()] == []
