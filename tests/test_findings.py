"""A line of the doctor says what it found and, unless all is well, what to do."""

import re

import pytest
from plugins_for_tests import sent

from rayserve_hooks import Finding


def test_a_finding_travels_and_does_not_change() -> None:
    finding = Finding("bucket", "warning", "is slow", "move it")
    assert sent(finding) == finding
    with pytest.raises(AttributeError, match="cannot assign"):
        finding.state = "ok"  # type: ignore[misc]


def test_a_finding_of_an_unknown_state_is_refused() -> None:
    text = "^state is 'error'; use one of ok, warning, problem$"
    with pytest.raises(ValueError, match=text):
        Finding("bucket", "error", "is not there", "make it")  # type: ignore[arg-type]


@pytest.mark.parametrize("state", ["warning", "problem"])
def test_a_finding_says_what_to_do(state: str) -> None:
    text = f"the finding about 'bucket' is a {state} without advice; say what to do"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        Finding("bucket", state, "is not there")  # type: ignore[arg-type]
    assert Finding("bucket", "ok", "is there").advice == ""
