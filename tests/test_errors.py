import pickle
import re
import threading
from typing import Any

import pytest

from rayserve_hooks.errors import (
    CallbackConfigError,
    DownloadError,
    HookError,
    HooksError,
    Phase,
    Problems,
    RemoteCause,
    describe,
    did_you_mean,
    formatted,
)

NODE = "n1 (10.0.0.1)"


def hook_error() -> HookError:
    return HookError(
        callback="Fetch",
        hook="on_before_init",
        node=NODE,
        phase=Phase.BEFORE_INIT,
        detail="ValueError: boom",
        advice="fix the callback",
    )


def fetch_the_weights(error: Exception) -> None:
    raise error


def raised_from(cause: Exception) -> HookError:
    error = hook_error()
    try:
        fetch_the_weights(cause)
    except Exception as caught:
        error.__cause__ = caught
    return error


def sent(error: HookError) -> HookError:
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, HookError)
    return copy


class LockedError(Exception):
    """Cannot be pickled."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


def exits() -> None:
    raise SystemExit(3)


class ExitsError(Exception):
    """Ends the process that rebuilds it."""

    def __reduce__(self) -> tuple[object, ...]:
        return exits, ()


class ExitsOnTheWayError(Exception):
    def __reduce__(self) -> tuple[object, ...]:
        raise KeyboardInterrupt


class NoErrorAnyMoreError(Exception):
    def __reduce__(self) -> tuple[object, ...]:
        return str, ("no exception",)


class TwoArgumentsError(Exception):
    """Pickles, but cannot be rebuilt from its args."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} ({code})")


def test_the_text_names_callback_hook_node_and_phase_and_says_what_to_do() -> None:
    assert str(hook_error()) == (
        "callback 'Fetch' failed in hook on_before_init on node n1 (10.0.0.1) "
        "(phase: before init): ValueError: boom; fix the callback"
    )


def test_the_text_without_a_callback_names_the_phase() -> None:
    error = HookError(callback=None, hook=None, node=NODE, phase=Phase.DOWNLOAD, detail="disk full")
    assert str(error) == (
        "node initialization failed on node n1 (10.0.0.1) (phase: download): disk full"
    )


def clean_up_error(name: str) -> HookError:
    return HookError(
        callback=name,
        hook="on_init_failed",
        node=NODE,
        phase=Phase.CLEAN_UP,
        detail="OSError: locked",
    )


def test_what_failed_in_the_clean_up_follows_in_the_text() -> None:
    error = hook_error()
    first, *rest = str(error).splitlines()
    error.cleanup_errors.extend([clean_up_error("A"), clean_up_error("B")])
    assert not rest
    assert str(error).splitlines() == [
        first,
        f"the clean-up failed too: {clean_up_error('A')}",
        f"the clean-up failed too: {clean_up_error('B')}",
    ]


def test_what_failed_in_the_clean_up_survives_pickling_with_its_cause() -> None:
    error, failure = hook_error(), clean_up_error("A")
    failure.__cause__ = OSError("locked")
    error.cleanup_errors.append(failure)
    (copy,) = sent(error).cleanup_errors
    assert vars(copy) == vars(failure)
    assert type(copy.__cause__) is OSError
    assert str(sent(error)) == str(error)


def test_two_errors_do_not_share_their_clean_up() -> None:
    error, other = hook_error(), hook_error()
    error.cleanup_errors.append(clean_up_error("A"))
    assert other.cleanup_errors == []


def test_fields_and_text_survive_pickling() -> None:
    error = hook_error()
    copy = sent(error)
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)
    assert copy.__cause__ is None


@pytest.mark.parametrize(
    ("phase", "text"),
    [
        (Phase.CONFIGURE, "configuring the deployment failed on node n1 (10.0.0.1) (phase: conf"),
        (Phase.ENGINE_START, "the engine's start failed on node n1 (10.0.0.1) (phase: engine sta"),
        (Phase.ENGINE_READY, "the engine's start failed on node n1 (10.0.0.1) (phase: engine rea"),
        (Phase.SHUTDOWN, "the shutdown failed on node n1 (10.0.0.1) (phase: shutdown)"),
    ],
)
def test_the_text_says_which_part_of_a_life_has_failed(phase: Phase, text: str) -> None:
    assert str(HookError(node=NODE, phase=phase, detail="no memory")).startswith(text)


def test_a_phase_is_its_name_and_stays_a_phase() -> None:
    phase = sent(hook_error()).phase
    assert phase is Phase.BEFORE_INIT
    assert f"{phase}" == "before init"


def test_phases_are_listed_in_order() -> None:
    assert list(Phase) == [
        "configure",
        "before init",
        "placement",
        "before download",
        "download",
        "engine arguments",
        "after init",
        "before engine init",
        "engine start",
        "engine ready",
        "shutdown",
        "clean-up",
    ]


def test_fields_without_a_callback_survive_pickling() -> None:
    error = HookError(callback=None, hook=None, node=NODE, phase=Phase.PLACEMENT, detail="no room")
    assert vars(sent(error)) == vars(error)


def test_the_cause_survives_pickling_with_its_type_and_arguments() -> None:
    cause = sent(raised_from(KeyError("missing"))).__cause__
    assert type(cause) is KeyError
    assert cause.args == ("missing",)


def test_the_cause_carries_its_traceback_as_a_note() -> None:
    cause = sent(raised_from(ValueError("boom"))).__cause__
    assert cause is not None
    (note,) = cause.__notes__
    assert note.startswith("traceback in the process where it was raised:\nTraceback (most recent")
    assert "in fetch_the_weights" in note
    assert note.endswith("ValueError: boom\n")


def test_a_second_journey_keeps_the_first_note() -> None:
    cause = sent(sent(raised_from(ValueError("boom")))).__cause__
    assert cause is not None
    assert "in fetch_the_weights" in cause.__notes__[0]


def test_pickling_leaves_the_original_cause_alone() -> None:
    error = raised_from(ValueError("boom"))
    sent(error)
    assert not hasattr(error.__cause__, "__notes__")


@pytest.mark.parametrize(
    ("original", "text"),
    [
        (LockedError("held"), "test_errors.LockedError: held"),
        (TwoArgumentsError(7, "refused"), "test_errors.TwoArgumentsError: refused (7)"),
        (ExitsError("out"), "test_errors.ExitsError: out"),
        (ExitsOnTheWayError("out"), "test_errors.ExitsOnTheWayError: out"),
        (NoErrorAnyMoreError("gone"), "test_errors.NoErrorAnyMoreError: gone"),
    ],
)
def test_a_cause_that_cannot_travel_becomes_a_stand_in(original: Exception, text: str) -> None:
    cause = sent(raised_from(original)).__cause__
    assert type(cause) is RemoteCause
    assert str(cause) == text
    assert "in fetch_the_weights" in cause.__notes__[0]


def test_a_local_class_of_cause_becomes_a_stand_in() -> None:
    class LocalError(Exception):
        pass

    cause = sent(raised_from(LocalError("here only"))).__cause__
    assert type(cause) is RemoteCause
    assert str(cause).endswith("LocalError: here only")


BREAKS_HERE = {"rebuilt": 0}


class RebuiltOnceError(Exception):
    """Can be rebuilt where it is sent, and nowhere else, as where a library is missing."""

    def __reduce__(self) -> tuple[object, ...]:
        return rebuilt_once, (self.args,)


def rebuilt_once(args: tuple[object, ...]) -> RebuiltOnceError:
    BREAKS_HERE["rebuilt"] += 1
    if BREAKS_HERE["rebuilt"] > 1:
        raise BREAKS_HERE["raises"]  # type: ignore[misc]
    return RebuiltOnceError(*args)


@pytest.mark.parametrize("raises", [ModuleNotFoundError("no module"), SystemExit(1)])
def test_a_cause_that_cannot_be_rebuilt_elsewhere_keeps_all_names(raises: Any) -> None:
    BREAKS_HERE.update(rebuilt=0, raises=raises)
    error = raised_from(RebuiltOnceError("no such bucket"))
    copy = sent(error)
    assert BREAKS_HERE["rebuilt"] == 2
    assert str(copy) == str(error)
    assert copy.callback == "Fetch"
    assert type(copy.__cause__) is RemoteCause
    assert str(copy.__cause__) == "test_errors.RebuiltOnceError: no such bucket"
    assert "in fetch_the_weights" in copy.__cause__.__notes__[0]


@pytest.mark.parametrize("kind", ["text", "payload"])
def test_a_huge_cause_is_cut_with_a_note(kind: str) -> None:
    cause = ValueError("boom " + "x" * 50_000_000) if kind == "text" else ValueError("boom")
    cause.payload = bytes(50_000_000) if kind == "payload" else b""  # type: ignore[attr-defined]
    data = pickle.dumps(raised_from(cause))
    assert len(data) < 200_000
    copy = pickle.loads(data)
    assert type(copy.__cause__) is RemoteCause
    assert str(copy.__cause__).startswith("ValueError: boom")
    if kind == "text":
        assert re.search(r"\d+ of 50000017 characters left out", str(copy.__cause__))


def test_a_long_text_is_cut_between_words() -> None:
    words = " ".join(f"word{number:06}" for number in range(10_000))
    text = describe(ValueError(words))
    assert len(text) < 20_100
    assert set(re.findall(r"word\S*", text)) < set(words.split())


class RecursesError(Exception):
    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


def test_an_error_that_python_cannot_format_keeps_its_name() -> None:
    error = RecursesError("no such bucket")
    text = f"{__name__}.RecursesError: no such bucket"
    assert describe(error) == formatted(error) == text
    assert str(sent(raised_from(error)).__cause__) == text


def test_describe_reads_like_the_last_line_of_a_traceback() -> None:
    assert describe(ValueError("boom")) == "ValueError: boom"
    assert describe(RuntimeError()) == "RuntimeError"


@pytest.mark.parametrize(
    ("cls", "base"),
    [(CallbackConfigError, ValueError), (DownloadError, RuntimeError), (HookError, RuntimeError)],
)
def test_our_errors_share_a_base_and_a_builtin(cls: type, base: type) -> None:
    assert issubclass(cls, HooksError)
    assert issubclass(cls, base)


def test_one_problem_is_its_own_text() -> None:
    error = CallbackConfigError("no such callback")
    assert (str(error), error.problems) == ("no such callback", ("no such callback",))


def test_many_problems_are_a_list() -> None:
    assert str(CallbackConfigError("one", "two")) == "2 problems:\n- one\n- two"


def test_collected_problems_are_one_error_without_repetitions() -> None:
    problems = Problems()
    for texts in [("one", "two"), ("two",), ("three",)]:
        with problems.collected():
            raise CallbackConfigError(*texts)
    assert problems
    with pytest.raises(CallbackConfigError) as caught:
        problems.raise_all()
    assert caught.value.problems == ("one", "two", "three")
    assert isinstance(caught.value.__cause__, CallbackConfigError)


def test_a_single_collected_problem_is_the_very_error() -> None:
    problems, error = Problems(), CallbackConfigError("one")
    with problems.collected():
        raise error
    with pytest.raises(CallbackConfigError) as caught:
        problems.raise_all()
    assert caught.value is error


def test_no_problem_raises_nothing() -> None:
    problems = Problems()
    problems.raise_all()
    assert not problems


def test_other_errors_are_not_collected() -> None:
    with pytest.raises(KeyError), Problems().collected():
        raise KeyError("one")


def test_a_problem_list_survives_pickling() -> None:
    assert pickle.loads(pickle.dumps(CallbackConfigError("one", "two"))).problems == ("one", "two")


def test_the_arguments_are_keyword_only() -> None:
    with pytest.raises(TypeError, match=re.escape("takes 1 positional argument")):
        HookError(NODE)  # type: ignore[call-arg]


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
