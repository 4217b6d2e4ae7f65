"""Every error this package raises on purpose, and how one crosses processes whole."""

from __future__ import annotations

import contextlib
import difflib
import enum
import itertools
import pickle
import re
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

_LONGEST_TEXT = 20_000
_LONGEST_PICKLE = 1_000_000


class HooksError(Exception):
    """Base class of this package's errors."""


class CallbackConfigError(HooksError, ValueError):
    """A callback list that cannot work; raised where the config is made.

    Attributes:
        problems: What is wrong, one text for each problem.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return "".join([f"{len(self.problems)} problems:", *(f"\n- {p}" for p in self.problems)])


class Problems:
    """Collects configuration errors, so that all are reported together and not one per run."""

    def __init__(self) -> None:
        self._errors: list[CallbackConfigError] = []

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Keep a ``CallbackConfigError`` of the block for later."""
        try:
            yield
        except CallbackConfigError as error:
            self._errors.append(error)

    def __bool__(self) -> bool:
        return bool(self._errors)

    def raise_all(self) -> None:
        """Raise what was collected, if anything, as one error.

        Raises:
            CallbackConfigError: The one error, or a list of all with the first as its cause.
        """
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            texts = dict.fromkeys(text for error in self._errors for text in error.problems)
            raise CallbackConfigError(*texts) from self._errors[0]


class InstallationError(HooksError, ImportError):
    """Ray, vLLM or a package that they need is missing, untested, or does not fit the others."""


class DownloadError(HooksError, RuntimeError):
    """The default download of a node failed, or what it left is not a model."""


def missing_extra(what: str, packages: Sequence[str], install: str) -> str:
    """Return a text that names the packages that are missing, and the extra that brings them.

    Args:
        what: What needs the packages.
        packages: Their names as modules.
        install: The extra, and where to install it.
    """
    plural = "s" if len(packages) > 1 else ""
    return f"{what} needs the package{plural} {', '.join(map(repr, packages))}; install {install}"


def missing_download_extra(what: str, error: ImportError) -> str:
    """Return the text for a download whose client cannot be imported."""
    package = (error.name or str(error)).partition(".")[0]
    return missing_extra(what, [package], "'rayserve_hooks[download]' on every node")


class PlacementError(HooksError, RuntimeError):
    """A placement group that the cluster can never hold."""


class RemoteCause(Exception):  # noqa: N818 - the name tells what it is in a traceback
    """Stands in for an original exception; keeps its type's name and its text.

    One that does not travel, or is too long to be read, or shows a secret, is not kept itself.
    """


class FailureReport(Exception):  # noqa: N818 - it reports an error
    """What a person reads of a failure: the error's text, then what led to it.

    It is the cause of an error on its way to Ray Serve, which prints causes first. What was the
    cause before is its context, which is not printed once more. Frames of this package that say
    nothing to whoever wrote a callback are left out.
    """

    @classmethod
    def of(cls, error: BaseException) -> FailureReport:
        """Return the report of an error whose causes may be shown."""
        cause = error.__cause__
        report = cls(f"{error}\n\n{formatted(cause)}".strip() if cause else str(error))
        report.__context__, report.__suppress_context__ = cause, True
        return report


class Phase(enum.StrEnum):
    """The steps of a replica's life, as errors and logs name them, in order."""

    CONFIGURE = "configure"
    BEFORE_INIT = "before init"
    PLACEMENT = "placement"
    BEFORE_DOWNLOAD = "before download"
    DOWNLOAD = "download"
    ENGINE_ARGUMENTS = "engine arguments"
    AFTER_INIT = "after init"
    BEFORE_ENGINE_INIT = "before engine init"
    ENGINE_START = "engine start"
    ENGINE_READY = "engine ready"
    SHUTDOWN = "shutdown"
    CLEAN_UP = "clean-up"


_FAILED = {
    Phase.CONFIGURE: "configuring the deployment failed",
    Phase.ENGINE_START: "the engine's start failed",
    Phase.ENGINE_READY: "the engine's start failed",
    Phase.SHUTDOWN: "the shutdown failed",
}


class HookError(HooksError, RuntimeError):
    """A step of a node initialization failed.

    The exception that a callback raised is the ``__cause__``. Both survive pickling, and the
    cause keeps its traceback as a note when it comes from another process, where Python would
    drop it.

    Attributes:
        callback: Name of the callback, or None when the step belongs to no callback.
        hook: Name of the hook, or None when the step is not a hook.
        node: The node the step ran on, as ``"<node id> (<address>)"``.
        phase: The step that failed, a `Phase`.
        process: The process it ran in, such as ``"worker 1"``; empty where the hook tells.
        detail: What went wrong.
        advice: What to do about it, where the detail does not say so.
        cleanup_errors: What failed in ``on_init_failed`` afterwards.
    """

    def __init__(
        self,
        *,
        node: str,
        phase: Phase,
        detail: str,
        callback: str | None = None,
        hook: str | None = None,
        advice: str = "",
        process: str = "",
        cleanup_errors: Sequence[HookError] = (),
    ) -> None:
        self.cleanup_errors = list(cleanup_errors)
        self.callback = callback
        self.hook = hook
        self.node = node
        self.phase = phase
        self.process = process
        self.detail = detail
        self.advice = advice
        super().__init__(detail)

    def __str__(self) -> str:
        return "\nthe clean-up failed too: ".join([self._text(), *map(str, self.cleanup_errors)])

    def _text(self) -> str:
        what = _FAILED.get(self.phase, "node initialization failed")
        if self.callback is not None:
            what = f"callback {self.callback!r} failed in hook {self.hook}"
        advice = f"; {self.advice}" if self.advice else ""
        where = f"{self.node}, {self.process}" if self.process else self.node
        return f"{what} on node {where} (phase: {self.phase}): {self.detail}{advice}"

    def __reduce__(self) -> tuple[object, ...]:
        fields = {name: value for name, value in vars(self).items() if name != "__notes__"}
        return _rebuild_hook_error, (fields, _portable(self.__cause__))


def raise_from(error: BaseException, cause: BaseException | None) -> NoReturn:
    """Raise an error with a cause, as ``raise ... from``, but without the handled one as context.

    A context would be the exception as it was, which may show a secret.
    """
    try:
        raise error from cause
    finally:
        error.__context__ = None


def did_you_mean(word: object, known: Iterable[object], *, cutoff: float = 0.6) -> str:
    """Return ``"; did you mean '...'?"``, or nothing if no known name is like ``word``."""
    close = difflib.get_close_matches(str(word), map(str, known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def own_text(error: BaseException) -> str:
    """Return an exception's type, text and notes, as the end of a traceback has them."""
    if is_readable(error):
        return "".join(traceback.format_exception_only(error)).strip()
    text = f"{type(error).__module__}.{type(error).__qualname__}"
    with contextlib.suppress(Exception):  # of what it was raised with
        text += f": {BaseException.__str__(error)}"
    return text


def is_readable(error: BaseException) -> bool:
    """Return whether Python can format an exception; it asks for notes, as code of its own may be.

    One that it cannot would end the process of whoever prints its traceback.
    """
    try:
        traceback.format_exception_only(error)
    except Exception:  # such as the RecursionError of a __getattr__
        return False
    return True


def describe(error: BaseException) -> str:
    """Return an exception's type and text, as the last line of a traceback has them, cut short."""
    return shortened(own_text(error))


def formatted(error: BaseException, limit: int | None = None) -> str:
    """Return an exception's traceback, or ``limit`` frames of each, with its causes, cut short.

    It begins with the first frame of others: those of this package that lead to a callback, and
    those of its own errors, say nothing to whoever wrote the callback.
    """
    if not is_readable(error):
        return own_text(error)
    report = traceback.TracebackException.from_exception(error, limit=limit)
    for part, shown in _parts(report, error):
        part.stack[:] = _frames_of_others(part.stack, type(shown))
    return shortened("".join(report.format()))


def _parts(
    report: traceback.TracebackException, error: BaseException
) -> Iterator[tuple[traceback.TracebackException, BaseException]]:
    """Yield the parts of a report, each with its exception: since Python 3.13 none has its type."""
    waiting: list[tuple[Any, Any]] = [(report, error)]
    while waiting:
        part, of = waiting.pop()
        if part is not None:
            yield part, of
            waiting += [(part.__cause__, of.__cause__), (part.__context__, of.__context__)]
            if part.exceptions:
                waiting += zip(part.exceptions, of.exceptions, strict=True)


_OURS = str(Path(__file__).parent)
_LEADING = re.compile(
    rf"{re.escape(_OURS)}/(?!impls/)|<frozen importlib|"
    r".*/(?:(?:asyncio|concurrent/futures|importlib|pluggy)/|contextlib\.py$)"
)


def _frames_of_others(
    stack: traceback.StackSummary, kind: type[BaseException]
) -> list[traceback.FrameSummary]:
    """Return a stack without its first frames, up to the first one of others.

    Where there is none, an error of another kind than ours is a mistake of ours, and all stay.
    """
    rest = list(itertools.dropwhile(lambda frame: _LEADING.match(frame.filename), stack))
    return rest if rest or issubclass(kind, HooksError) else list(stack)


def shortened(text: str) -> str:
    """Return a text without its middle, with a note, if it is longer than people read."""
    if len(text) <= _LONGEST_TEXT:
        return text
    # At white space, or half of a secret would be left, which nobody finds to mask it.
    head = re.sub(r"\S{1,200}$", "", text[: _LONGEST_TEXT // 2])
    tail = re.sub(r"^\S{1,200}", "", text[-_LONGEST_TEXT // 2 :])
    left_out = len(text) - len(head) - len(tail)
    return f"{head}... ({left_out} of {len(text)} characters left out) ...{tail}"


def _portable(error: BaseException | None) -> tuple[bytes | None, str, str] | None:
    """Turn an exception into its bytes, if they travel, its text and its formatted traceback."""
    if error is None:
        return None
    data = None
    try:
        data = pickle.dumps(error)
        if len(data) > _LONGEST_PICKLE:
            data = None
        else:
            pickle.loads(data)  # some exceptions pickle, but cannot be rebuilt from their args
    except BaseException:  # any class can fail here in its own way, or exit; the text remains
        data = None
    return data, describe(error), formatted(error)


def _rebuild_hook_error(
    fields: dict[str, Any], portable_cause: tuple[bytes | None, str, str] | None
) -> HookError:
    error = HookError(**fields)
    if portable_cause is not None:
        data, text, traceback_there = portable_cause
        note = f"traceback in the process where it was raised:\n{traceback_there}"
        try:
            assert data is not None
            cause = pickle.loads(data)
            cause.add_note(note)
            error.__cause__ = cause
        except BaseException:  # its class may be missing in this process, or exit; as above
            error.__cause__ = RemoteCause(text)
            error.__cause__.add_note(note)
    return error
