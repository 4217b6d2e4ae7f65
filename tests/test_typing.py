"""Type checkers accept every way to write a callback, and find misspelt names and wrong values."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CASES = ROOT / "tests" / "typing_cases.py"
# The engine's types count as Any: to read them would take a minute.
CONFIG = """
[mypy]
strict = True
follow_imports = silent
[mypy-ray.*,vllm.*]
follow_imports = skip
"""


def marked(source: str) -> dict[int, str]:
    """Return the expected text of each line that has one."""
    marks = (line.partition("# error: ") for line in source.splitlines())
    return {number: text for number, (_, mark, text) in enumerate(marks, start=1) if mark}


def reported(output: str) -> dict[int, list[str]]:
    """Return mypy's errors by line."""
    errors: dict[int, list[str]] = {}
    for line, text in re.findall(r"^\S+:(\d+): error: (.*)$", output, re.MULTILINE):
        errors.setdefault(int(line), []).append(text)
    return errors


def differences(expected: Mapping[int, str], errors: Mapping[int, list[str]]) -> Iterator[str]:
    for line in sorted({*expected, *errors}):
        found = errors.get(line, [])
        if line not in expected:
            yield f"line {line} has an error: {'; '.join(found)}"
        elif len(found) != 1 or expected[line] not in found[0]:
            yield f"line {line} should have the error {expected[line]!r}, has {found or 'none'}"


@pytest.mark.slow
def test_mypy_reports_what_is_marked_and_nothing_else(tmp_path: Path) -> None:
    config = tmp_path / "mypy.ini"
    config.write_text(CONFIG)
    options = ["--config-file", str(config), "--cache-dir", str(ROOT / ".cache" / "mypy-typing")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(CASES)],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    expected = marked(CASES.read_text())
    assert len(expected) > 20
    assert list(differences(expected, reported(done.stdout))) == []


@pytest.mark.parametrize(
    ("source", "output", "difference"),
    [
        ("a = 1", "x.py:1: error: Name unknown", "line 1 has an error: Name unknown"),
        ("a  # error: Name", "", "line 1 should have the error 'Name', has none"),
        (
            "a  # error: Name",
            "x.py:1: error: Other",
            "line 1 should have the error 'Name', has ['Other']",
        ),
        (
            "a  # error: Name",
            "x.py:1: error: Name\nx.py:1: error: More",
            "line 1 should have the error 'Name', has ['Name', 'More']",
        ),
    ],
)
def test_a_difference_is_found(source: str, output: str, difference: str) -> None:
    assert list(differences(marked(source), reported(output))) == [difference]


def test_no_difference_is_none() -> None:
    output = 'x.py:2: error: Name "a" is not defined  [name-defined]\nx.py:2: note: Did you mean b?'
    assert list(differences(marked("b = 1\na  # error: Name"), reported(output))) == []
