"""Copies of exceptions without secrets."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

import pytest

from rayserve_hooks.core.masked_errors import masked
from rayserve_hooks.errors import RemoteCause

SECRET = "hunter22-very"
KNOWN = {"password": SECRET}


@dataclass
class Settings:
    password: str


class OfTwoError(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} ({code})")


class OwnTextError(Exception):
    def __init__(self, response: str) -> None:
        self.response = response

    def __str__(self) -> str:
        return f"got {self.response}"


class SlotError(Exception):
    __slots__ = ("x",)

    def __init__(self, x: str) -> None:
        self.x = x

    def __str__(self) -> str:
        return self.x


ERRORS = [
    ValueError(SECRET),
    KeyError(SECRET),
    FileNotFoundError(2, "no", f"/x/{SECRET}"),
    OfTwoError(1, SECRET),
    OwnTextError(SECRET),
    ValueError(Settings(SECRET)),
    ValueError(SECRET.encode()),
    ValueError({"password": SECRET}),
    ExceptionGroup("group", [ValueError(SECRET), KeyError("a")]),
    SystemExit(SECRET),
    ImportError(SECRET, name="m"),
    SyntaxError(SECRET, ("f", 1, 2, f"x = {SECRET}")),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_copy_has_the_type_and_no_secret(error: BaseException) -> None:
    error.add_note(f"a note of {SECRET}")
    copy = masked(error, KNOWN)
    assert type(copy) is type(error)
    assert SECRET not in "".join(traceback.format_exception(copy)) + repr(copy)
    assert SECRET in "".join(traceback.format_exception(error)), "the callback's own stays"


def test_what_cannot_be_copied_has_a_stand_in() -> None:
    copy = masked(SlotError(SECRET), KNOWN)
    assert type(copy) is RemoteCause
    assert str(copy).endswith("SlotError: ***")


def raised() -> Exception:
    try:
        try:
            raise KeyError(SECRET)
        except KeyError:
            raise OSError(SECRET)  # noqa: B904 - with a context
    except OSError as error:
        try:
            raise ValueError("plain") from error
        except ValueError as outer:
            return outer


def test_causes_and_contexts_are_copies_with_their_tracebacks() -> None:
    error = raised()
    copy = masked(error, KNOWN)
    cause = copy.__cause__
    assert cause is not None
    assert (type(cause), type(cause.__context__)) == (OSError, KeyError)
    for new, old in ((copy, error), (cause, error.__cause__)):
        assert old is not None
        assert new.__traceback__ is old.__traceback__ is not None
    assert SECRET not in "".join(traceback.format_exception(copy))


def test_an_error_without_secrets_is_itself() -> None:
    error = raised()
    assert masked(error) is error


def test_an_error_that_leads_to_itself_ends() -> None:
    error, other = ValueError(SECRET), KeyError("x")
    error.__context__, other.__context__ = other, error
    assert SECRET not in "".join(traceback.format_exception(masked(error, KNOWN)))


LONG = f"{SECRET} {'word ' * 20_000}"


@pytest.mark.parametrize(
    "error",
    [
        ValueError(LONG),
        ValueError(f"{'word ' * 20_000} {SECRET}"),
        OSError(5, LONG),
        OfTwoError(1, LONG),
        OwnTextError(LONG),
        RuntimeError(LONG.encode()),
        RuntimeError({"body": [LONG]}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_long_one_is_cut_and_keeps_its_type(error: Exception) -> None:
    copy = masked(error, KNOWN)
    assert type(copy) is type(error)
    assert "characters left out" in str(copy)
    assert SECRET not in str(copy)
    assert len(str(copy)) < 25_000
