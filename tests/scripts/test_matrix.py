"""What the matrix makes of environments and reports; the runs themselves are its own."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matrix
import pytest
from ray_contract import FEATURES

from rayserve_hooks.cluster.versions import TESTED

REPORT = """<testsuites><testsuite>
<testcase classname="tests.cluster.test__ray" name="a" time="1.5"/>
<testcase classname="tests.cluster.test__ray" name="b" time="0.5"><failure/></testcase>
<testcase classname="tests.cluster.test__ray" name="c" time="0"><skipped/></testcase>
</testsuite></testsuites>"""


def test_a_cell_adds_up_its_cases() -> None:
    cell = matrix.cell_of(list(ET.fromstring(REPORT).iter("testcase")))
    assert str(cell) == "1 passed, **1 failed**, 1 skipped in 2 s"
    assert not cell.good
    assert cell.failed == ["tests.cluster.test__ray::b"]


def test_a_cell_without_tests_is_not_good() -> None:
    assert not matrix.cell_of([]).good


def test_one_environment_brings_each_engine_and_the_others_share_it() -> None:
    made: list[Path] = []
    brings: dict[str, Path] = {}
    for environment in matrix.ray_environments(list(TESTED)):
        assert set(environment.shares) <= {*made, matrix.ROOT / ".venv"}, "made before"
        brought = brings.setdefault(TESTED[environment.ray], environment.folder)
        assert brought in (environment.folder, *environment.shares)
        made.append(environment.folder)
    assert made[-1] == matrix.ROOT / ".venv"


def test_the_python_that_runs_is_found() -> None:
    found = matrix.find_python(matrix.own_python())
    assert found is not None
    assert matrix.find_python("3.99") is None


@pytest.mark.parametrize("group", matrix.GROUPS)
def test_the_groups_name_tests_that_are_there(group: str) -> None:
    for test in matrix.GROUPS[group]:
        file, _, name = test.partition("::")
        assert f"def {name or 'test_'}" in (matrix.ROOT / file).read_text()


def test_a_row_says_what_the_tests_of_an_environment_gave(tmp_path: Path) -> None:
    """A real run of pytest on one small file, in an environment that is this one."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = matrix.Environment(tmp_path, sys.executable, "2.60", "cpu")
    cases = environment.test("tests/core/test_hooks.py", "-p", "no:cacheprovider")
    assert matrix.cell_of(cases).good
    assert {case.get("classname") for case in cases} == {"tests.core.test_hooks"}


def test_the_page_has_all_tables() -> None:
    text = matrix.page(
        [["2.60.0", "0.29.0", "3.11.7", "1", "2", "3", "4"]], [["3.11.7", "2.60.0", "5"]]
    )
    assert "| 2.60.0 | 0.29.0 | 3.11.7 | 1 | 2 | 3 | 4 |" in text
    assert "| 3.11.7 | 2.60.0 | 5 |" in text
    assert all(feature.text in text for feature in FEATURES)
