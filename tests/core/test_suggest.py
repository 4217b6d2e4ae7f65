import pytest

from rayserve_hooks.core.suggest import did_you_mean

NAMES = ("callback", "kwargs", "name", "on_error")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("kwarg", "; did you mean 'kwargs'?"),
        ("nam", "; did you mean 'name'?"),
        ("zzz", ""),
        ("", ""),
        (7, ""),
        (None, ""),
        (("on", "error"), "; did you mean 'on_error'?"),
    ],
)
def test_the_closest_name_if_one_is_close(word: object, hint: str) -> None:
    assert did_you_mean(word, NAMES) == hint


def test_known_names_of_any_kind() -> None:
    assert did_you_mean(100, [1000, "x"]) == "; did you mean '1000'?"
    assert did_you_mean("kwarg", dict.fromkeys(NAMES)) == "; did you mean 'kwargs'?"
    assert did_you_mean("kwarg", []) == ""


def test_how_close_is_close() -> None:
    assert did_you_mean("on_eror", NAMES, cutoff=0.9) == "; did you mean 'on_error'?"
    assert did_you_mean("on_eor", NAMES, cutoff=0.9) == ""
