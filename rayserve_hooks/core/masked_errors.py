"""Exceptions without the secrets that their texts, causes and contexts would show."""

from __future__ import annotations

import contextlib
import functools
import re
import traceback
from collections.abc import Callable
from typing import Any

from rayserve_hooks.core.masking import Masker
from rayserve_hooks.core.secret_texts import MASK, names_secret
from rayserve_hooks.errors import RemoteCause, formatted, is_readable, own_text, shortened

_DEEPEST = 50  # of causes, groups and arguments; what is deeper is left out
_LONGEST = 100_000  # of all that the copies of one exception hold
_LEFT_OUT = "... (left out)"


def masked(error: BaseException, *values: object) -> BaseException:
    """Return an exception as it may be shown: itself, or a copy of it without secrets.

    A copy has the type and the traceback, and so have its causes, contexts and the members of a
    group. Where a copy cannot be made, or its text would not be the masked one, a `RemoteCause`
    stands in. The exception itself stays as it is: a callback may hold it.

    Args:
        error: Whatever was raised.
        *values: Where known secrets are; see `Masker`.
    """
    return _Copies(Masker(*values)).of(error) or RemoteCause(type(error).__name__)


class _Copies:
    """The copies of one exception and of all that it came from."""

    def __init__(self, masker: Masker) -> None:
        self._masker = masker
        self._made: dict[int, BaseException | None] = {}
        self._left = _LONGEST

    def of(self, error: BaseException | None, depth: int = 0) -> BaseException | None:
        if error is None or depth > _DEEPEST:
            return None
        if id(error) not in self._made:
            self._made[id(error)] = None  # for one that leads back to itself
            self._made[id(error)] = self._masked(error, depth + 1)
        return self._made[id(error)]

    def _masked(self, error: BaseException, depth: int) -> BaseException:
        cause, context = self.of(error.__cause__, depth), self.of(error.__context__, depth)
        members = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        if not is_readable(error):
            stand_in = RemoteCause(self._masker.text(shortened(own_text(error))))
            stand_in.__cause__, stand_in.__context__ = cause, context
            return stand_in
        text, frames = own_text(error), "".join(traceback.format_tb(error.__traceback__))
        short, shows_more = shortened(text), self._shows_more(error)
        clean = self._masker.text(short)
        clean_frames = self._masker.source(frames)
        if (
            (clean, clean_frames, shows_more) == (text, frames, False)
            and cause is error.__cause__
            and context is error.__context__
            and all(self.of(member, depth) is member for member in members)
        ):
            return error
        copy = self._copy(error, clean, depth, cut=short != text)
        copy.__cause__, copy.__context__ = cause, context
        copy.__suppress_context__ = error.__suppress_context__
        if clean_frames == frames:
            return copy.with_traceback(error.__traceback__)
        # A line of its source code holds one.
        copy.add_note(f"traceback, without secrets:\n{shortened(clean_frames)}")
        return copy

    def _copy(self, error: BaseException, clean: str, depth: int, cut: bool) -> BaseException:
        def of_text(args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (self._masker.text(shortened(str(error))),)

        for change in (functools.partial(self._value, depth=depth), of_text):
            # Any class can refuse in its own way, or exit.
            with contextlib.suppress(BaseException):
                copy = self._rebuilt(error, change, depth)
                if self._shows_more(copy):
                    continue
                text = own_text(copy)
                if _unmarked(text) == _unmarked(clean):
                    return copy
                # A long one is cut in its arguments, which is not where its whole text is cut.
                if cut and len(text) < 2 * len(clean) and self._masker.text(text) == text:
                    return copy
        stand_in = RemoteCause(clean)
        if isinstance(error, BaseExceptionGroup):
            stand_in.add_note(self._masker.text(formatted(error, limit=0)))
        return stand_in

    def _shows_more(self, error: BaseException) -> bool:
        """Return whether its repr, which a log may have, shows a secret."""
        with contextlib.suppress(BaseException):  # as above
            text = shortened(repr(error))
            return self._masker.text(text) != text
        return False

    def _rebuilt(
        self, error: BaseException, change: Callable[[Any], Any], depth: int
    ) -> BaseException:
        """Return a copy with other arguments, without a call of the class's own constructor."""
        cls = type(error)
        builtin: Any = next(base for base in cls.__mro__ if base.__module__ == "builtins")
        # Of an OSError these are more than its args.
        given = builtin.__reduce__(error)[1]
        args = change(given)
        copy: BaseException = cls.__new__(cls, *args)
        builtin.__init__(copy, *args)
        if not isinstance(error, BaseExceptionGroup):
            copy.args = args if given is error.args else change(error.args)
        for name, value in vars(error).items():
            copy.__dict__[name] = MASK if names_secret(name) else self._value(value, depth, False)
        return copy

    def _value(self, value: Any, depth: int, shown: bool = True) -> Any:
        """Return what an exception holds, masked as its text is; what is ``shown``, of any type."""
        kind = type(value)
        if kind in (str, bytes):
            return self._text(value)
        if kind is dict and depth < _DEEPEST:
            return {
                key: MASK if names_secret(key) else self._value(item, depth + 1, shown)
                for key, item in value.items()
            }
        if kind in (list, tuple, set) and depth < _DEEPEST:
            items = [self._value(item, depth + 1, shown) for item in value if self._left > 0]
            return kind(items if len(items) == len(value) else [*items, _LEFT_OUT])
        if isinstance(value, BaseException):
            return self.of(value, depth)
        return self._described(value) if shown and kind not in _PLAIN else value

    def _text(self, value: str | bytes) -> str | bytes:
        text = value if isinstance(value, str) else value.decode("latin-1")
        text = shortened(text) if self._left > 0 else _LEFT_OUT
        self._left -= len(text)
        clean = self._masker.text(text)
        return clean if isinstance(value, str) else clean.encode("latin-1")

    def _described(self, value: object) -> object:
        texts = shortened(str(value)), shortened(repr(value))
        clean = tuple(map(self._masker.text, texts))
        return value if clean == texts else _Described(*clean)


def _unmarked(text: str) -> str:
    """Return a text without the marks below a line of source, which may be as long as the line."""
    return _MARKS.sub("", text)


_MARKS = re.compile(r"^[ ~]*\^[ ~^]*\n?", re.MULTILINE)
_PLAIN = (int, bool, float, complex, type(None))


class _Described:
    """Stands for an argument whose texts show a secret."""

    def __init__(self, text: str, representation: str) -> None:
        self._text, self._representation = text, representation

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return self._representation
