"""What the examples of integrations have in common."""

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "integrations"
FILES = sorted(EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_is_short_and_has_a_test(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 60
    assert Path(__file__).with_name(f"test_{file.stem}.py").exists()


def test_there_are_five() -> None:
    assert len(FILES) == 5
