"""Copies of exceptions without secrets."""

from __future__ import annotations

import time
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


class TextHidesError(Exception):
    def __str__(self) -> str:
        return "refused"


class NoTextError(Exception):
    def __str__(self) -> str:
        raise ValueError(self.args)


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


@pytest.mark.parametrize("cls", [TextHidesError, NoTextError])
def test_what_only_its_repr_shows_is_masked(cls: type[Exception]) -> None:
    copy = masked(cls(SECRET), KNOWN)
    assert (type(copy), repr(copy)) == (cls, f"{cls.__name__}('***')")


class OwnReprError(Exception):
    def __repr__(self) -> str:
        return f"OwnReprError({SECRET})"


def test_what_cannot_be_copied_has_a_stand_in() -> None:
    copy = masked(OwnReprError("x"), KNOWN)
    assert (type(copy), str(copy)) == (RemoteCause, f"{__name__}.OwnReprError: x")
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


class RecursesError(Exception):
    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


def test_one_that_python_cannot_format_has_a_stand_in() -> None:
    outer = ValueError("outer")
    outer.__cause__ = RecursesError(f"refused {SECRET}")
    cause = masked(outer, KNOWN).__cause__
    assert type(cause) is RemoteCause
    assert str(cause) == f"{__name__}.RecursesError: refused ***"
    traceback.format_exception(cause)


def test_one_with_many_long_arguments_is_masked_soon() -> None:
    error = ValueError(SECRET, *["y" * 1000] * 30_000)
    started = time.process_time()
    copy = masked(error, KNOWN, error)
    assert time.process_time() - started < 10  # more than 60 s where all are looked into
    assert type(copy) is ValueError
    assert SECRET not in str(copy)
    assert len(str(copy)) < 25_000


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
