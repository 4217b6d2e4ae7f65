"""The page and the pictures of the benchmarks say what their results say, for people."""

from __future__ import annotations

import importlib
import json
import re
import statistics
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "docs" / "benchmarks").glob("*.json"))


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("report")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2606.4, "2,610"),
        (1234567.0, "1,230,000"),
        (99.96, "100.0"),
        (32.66, "32.7"),
        (2.0, "2.00"),
        (0.0392, "0.0392"),
        (0.000001234, "0.00000123"),
        (0, "0"),
    ],
)
def test_a_number_has_three_digits_that_count_and_no_exponent(
    value: float, text: str, report: ModuleType
) -> None:
    assert report.number(value) == text


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([2.0, 2.1, 9.0], "ours is 2.0\N{MULTIPLICATION SIGN} as fast as stock Ray"),
        ([0.1], "ours is 42\N{MULTIPLICATION SIGN} as fast as stock Ray"),
        ([4.1], "ours is as fast as stock Ray"),
        ([8.4], "ours takes 2.0\N{MULTIPLICATION SIGN} the time of stock Ray"),
    ],
)
def test_a_comparison_is_said_in_words(ours: list[float], verdict: str, report: ModuleType) -> None:
    assert report.verdict("x", {"stock Ray": [4.2], "ours": ours}) == verdict


def test_the_page_has_no_exponents_and_short_ratios(report: ModuleType) -> None:
    page = report.page()
    assert not re.search(r"\d[eE][+-]?\d", page)
    assert "0.952" not in page
    assert "at least 0.95 is wanted" in page


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_a_picture_has_every_comparison_and_value_written_on_it(
    file: Path, report: ModuleType
) -> None:
    result = json.loads(file.read_text())
    drawn = re.findall(r">([^<>\n]+)</text>", file.with_suffix(".svg").read_text())
    wanted = [result["title"]]
    for case, sides in result["values"].items():
        wanted.append(f"{report.label(file.stem, case)}: {report.verdict(file.stem, sides)}")
        for side, values in sides.items():
            middle = report.number(statistics.median(values))
            wanted += [side, f"{middle} {result['unit']}"]
    assert [text for text in wanted if text not in map(unescaped, drawn)] == []


def unescaped(text: str) -> str:
    return text.replace("&#39;", "'").replace("&amp;", "&")
