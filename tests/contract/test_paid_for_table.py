"""Each row of what is paid for names a test that exists, with the very case; and no case of those tests lacks a row."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "services" / "billing" / "README.md").read_text(encoding="utf-8")
CASES = "tests/integration/test_paid_for.py"
_TEST = re.compile(r"`(tests/[\w/]+\.py::[\w\[\]-]+)`")


def rows() -> list[str]:
    lines = [
        line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| what happens")
    ]
    assert len(lines) > 25
    return lines


@cache
def collected(path: str) -> frozenset[str]:
    """All tests of a file, as pytest finds them."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return frozenset(line for line in done.stdout.splitlines() if "::" in line)


def test_every_row_names_tests_that_are_there() -> None:
    for row in rows():
        named = _TEST.findall(row)
        assert named, f"no test is named: {row}"
        for test in named:
            assert test in collected(test.partition("::")[0]), test
    for test in _TEST.findall(PAGE):
        assert test in collected(test.partition("::")[0]), test


def test_every_case_has_its_row() -> None:
    assert collected(CASES) - set(_TEST.findall(PAGE)) == set()
