"""What becomes of a callback's failure, and that no secret gets into it."""

import pickle
import traceback
from contextlib import nullcontext
from typing import Any

import pytest
from plugins_for_tests import hook_log, make_ctx, make_manager
from steps import call, outcomes, step

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core.hooks import CLEAN_UP
from rayserve_hooks.errors import CallbackConfigError, DownloadError, HookError


@pytest.mark.parametrize(
    ("hook", "phase"),
    [
        ("on_before_init", "before init"),
        ("on_before_download", "before download"),
        ("on_after_init", "after init"),
    ],
)
def test_a_failure_names_callback_hook_node_and_phase(hook: str, phase: str) -> None:
    cause = ValueError("boom")
    with pytest.raises(HookError) as caught:
        call(step("a", error=cause, hook=hook), hook=hook)
    error = caught.value
    assert vars(error) == {
        "callback": "a",
        "hook": hook,
        "node": "n1 (10.0.0.1)",
        "phase": phase,
        "detail": "ValueError: boom",
        "advice": "fix the callback, or set 'on_error: warn' on it to go on without it",
        "cleanup_errors": [],
    }
    assert error.__cause__ is cause
    assert str(error).startswith(
        f"callback 'a' failed in hook {hook} on node n1 (10.0.0.1) (phase: {phase}): "
        "ValueError: boom; fix the callback, or set 'on_error: warn'"
    )


def test_a_download_says_itself_what_to_do() -> None:
    cause = DownloadError("cannot list s3://b: 403 Forbidden; check the credentials")
    with pytest.raises(HookError, match=r"403 Forbidden; check the credentials$"):
        call(step("a", error=cause))


def test_a_failure_stops_the_chain() -> None:
    ctx = make_ctx()
    with pytest.raises(HookError):
        call(step("a"), step("b", error=ValueError("boom")), step("c"), ctx=ctx)
    assert outcomes(ctx) == [("a", "returned"), ("b", "failed")]


def test_on_error_warn_goes_on_with_the_next() -> None:
    ctx = make_ctx()
    stack = [step("a", error=ValueError("boom"), on_error="warn"), step("b", result=Handled("/m"))]
    assert call(*stack, ctx=ctx) == Handled("/m")
    assert outcomes(ctx) == [("a", "warned"), ("b", "handled")]


def test_on_error_warn_logs_with_traceback(caplog: pytest.LogCaptureFixture) -> None:
    cause = ValueError("boom")
    with hook_log(caplog):
        call(step("a", error=cause, on_error="warn"))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("callback 'a' failed in hook on_before_init on node n1")
    assert record.getMessage().endswith("(on_error: warn, going on)")
    assert record.exc_info is not None
    assert record.exc_info[1] is cause
    assert "Traceback (most recent call last):" in caplog.text


def test_on_error_warn_also_forgives_a_wrong_result() -> None:
    assert call(step("a", result=True, on_error="warn"), step("b", result=Handled())) == Handled()


def test_on_error_warn_also_forgives_a_hook_that_the_callback_itself_called() -> None:
    inner = make_manager(step("inner", error=ValueError("boom")))

    class Calls:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            inner.hook.on_before_init(ctx=ctx)

    ctx = make_ctx()
    call({"callback": Calls, "on_error": "warn"}, step("b"), ctx=ctx)
    assert outcomes(ctx) == [("Calls", "warned"), ("inner", "failed"), ("b", "returned")]


def test_a_hook_error_of_an_inner_call_keeps_its_name() -> None:
    inner = make_manager(step("inner", error=ValueError("boom")))

    class Calls:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            inner.hook.on_before_init(ctx=ctx)

    with pytest.raises(HookError) as caught:
        call(Calls)
    assert caught.value.callback == "inner"


def test_the_stack_says_what_an_entry_does_not() -> None:
    failing = step("a", error=ValueError("boom")) | {"on_error": None}
    assert make_manager(failing, on_error="warn").hook.on_before_init(ctx=make_ctx()) is None
    with pytest.raises(HookError):
        make_manager(failing, on_error="raise").hook.on_before_init(ctx=make_ctx())


def test_an_entry_overrules_the_stack() -> None:
    failing = step("a", error=ValueError("boom"), on_error="raise")
    with pytest.raises(HookError):
        make_manager(failing, on_error="warn").hook.on_before_init(ctx=make_ctx())


SECRET = "hf_abcdefgh"


def leaks(self: object, ctx: CallbackCtx) -> None:
    try:
        raise KeyError(f"{SECRET} in the inner one")
    except KeyError as error:
        raise ValueError(f"401 for {SECRET}") from error


class Token:
    """Knows a secret by its arguments and shows it in an error."""

    def __init__(self, hf_token: str) -> None:
        pass

    on_before_init = leaks


LEAKS = type("Leaks", (), {"on_before_init": leaks})
BY_CONTEXT: tuple[Any, Any] = (
    {"callback": LEAKS},
    {"runtime_env": {"env_vars": {"HF_TOKEN": SECRET}}},
)
BY_KWARGS: tuple[Any, Any] = ({"callback": Token, "kwargs": {"hf_token": SECRET}}, {})
leaking = pytest.mark.parametrize(("callback", "fields"), [BY_CONTEXT, BY_KWARGS])


@leaking
def test_a_secret_reaches_no_error_and_no_cause(
    callback: dict[str, object], fields: dict[str, Any]
) -> None:
    with pytest.raises(HookError) as caught:
        call(callback, ctx=make_ctx(**fields))
    error = pickle.loads(pickle.dumps(caught.value))
    for found in (caught.value, error):
        assert found.detail == "ValueError: 401 for ***"
        assert type(found.__cause__) is ValueError
        assert str(found.__cause__) == "401 for ***"
        assert found.__context__ is None
        formatted = "".join(traceback.format_exception(found))
        assert SECRET not in formatted
        assert "in leaks" in formatted
        assert "KeyError: '*** in the inner one'" in formatted


@leaking
@pytest.mark.parametrize("hook", ["on_before_init", CLEAN_UP])
def test_a_secret_reaches_no_log(
    callback: dict[str, Any], fields: dict[str, Any], hook: str, caplog: pytest.LogCaptureFixture
) -> None:
    cls = type("Leaks", (callback["callback"],), {hook: leaks})
    with hook_log(caplog):
        call({**callback, "callback": cls, "on_error": "warn"}, ctx=make_ctx(**fields), hook=hook)
    assert "ValueError: 401 for ***" in caplog.text
    assert "Traceback (most recent call last):" in caplog.text
    assert SECRET not in caplog.text


def test_a_secret_reaches_no_log_of_a_failed_clean_up(caplog: pytest.LogCaptureFixture) -> None:
    with hook_log(caplog):
        call(
            type("Leaks", (), {CLEAN_UP: leaks}),
            ctx=make_ctx(custom_data={"password": SECRET}),
            hook=CLEAN_UP,
        )
    assert "ValueError: 401 for ***" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("made", "advice"),
    [
        ({"on_error": "raise"}, "; fix the callback, or set 'on_error: warn' on it to go on"),
        ({"on_error": "warn"}, "; fix the callback (on_error: warn, going on)"),
        ({"hook": CLEAN_UP}, "; fix the callback"),
    ],
)
def test_on_error_is_advised_where_it_helps_and_is_not_set(
    made: Any, advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    hook = made.get("hook", "on_before_init")
    failing = step("a", error=ValueError("boom"), **made)
    raises = pytest.raises(HookError) if made.get("on_error") == "raise" else nullcontext()
    with hook_log(caplog), raises as caught:
        call(failing, hook=hook)
    text = str(caught.value) if caught else caplog.records[0].getMessage()
    assert f"ValueError: boom{advice}" in text
    assert text.count("on_error") == (hook != CLEAN_UP)


def test_on_error_is_not_advised_for_what_no_config_names() -> None:
    class Failing:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            raise ValueError("boom")

    manager = make_manager()
    manager.register(Failing(), "mine")
    with pytest.raises(HookError, match=r"ValueError: boom; fix the callback$"):
        manager.hook.on_before_init(ctx=make_ctx())


def test_on_error_is_not_advised_for_what_says_itself_what_to_do() -> None:
    class Asks:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            raise CallbackConfigError("no such callback; name another")

    with pytest.raises(HookError, match=r"no such callback; name another$"):
        call(Asks)


def test_a_secret_reaches_neither_the_context_nor_the_trace() -> None:
    def sets(self: object, ctx: CallbackCtx) -> None:
        ctx.runtime_env["env_vars"] = {"HF_TOKEN": SECRET}
        ctx.extra_init_kwargs["api_key"] = SECRET
        ctx.custom_data["stores"] = [{"password": SECRET}]

    ctx = make_ctx()
    call(type("Sets", (), {"on_before_init": sets}), ctx=ctx)
    assert SECRET not in repr(ctx) + repr(ctx.trace) + ctx.trace.table() + repr(list(ctx.trace))
    assert len(ctx.trace[0].changes) == 3


def test_a_cause_without_a_secret_is_the_very_exception() -> None:
    cause = ValueError("boom")
    with pytest.raises(HookError) as caught:
        call(step("a", error=cause), ctx=make_ctx(custom_data={"password": SECRET}))
    assert caught.value.__cause__ is cause
