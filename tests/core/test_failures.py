"""What becomes of a callback's failure, and that no secret gets into it."""

import pickle
import traceback
from typing import Any

import pytest
from plugins_for_tests import hook_log, make_ctx, make_manager
from steps import call, outcomes, step

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core.hooks import CLEAN_UP
from rayserve_hooks.errors import CallbackConfigError, DownloadError, HookError, Phase
from rayserve_hooks.testing import Fail, ModelConfig, RunStack

ONCE = "; set RAYSERVE_HOOKS_DISABLE=a to start once without it"


@pytest.mark.parametrize(
    ("hook", "phase"),
    [
        ("on_before_init", "before init"),
        ("on_before_download", "before download"),
        ("on_after_init", "after init"),
        ("on_configure", "configure"),
        ("on_engine_ready", "engine ready"),
    ],
)
def test_a_failure_names_callback_hook_node_and_phase(
    run_stack: RunStack, hook: str, phase: str
) -> None:
    error = run_stack(step("a", error=ValueError("boom"), hook=hook)).assert_failed()
    advice = "fix the callback, or set 'on_error: warn' on it to go on without it"
    node = "local (127.0.0.1)"  # where the app is built
    if hook != "on_configure":
        node, advice = "node-1 (10.0.0.1)", f"{advice}{ONCE}"
    assert vars(error) == {
        "callback": "a",
        "hook": hook,
        "node": node,
        "phase": phase,
        "detail": "ValueError: boom",
        "advice": advice,
        "process": "",
        "cleanup_errors": [],
    }
    assert repr(error.__cause__) == "ValueError('boom')"
    assert str(error) == (
        f"callback 'a' failed in hook {hook} on node {node} (phase: {phase}): ValueError: boom; "
        f"{advice}"
    )


def test_a_failure_in_a_process_of_the_engine_names_the_process(run_stack: RunStack) -> None:
    failing = Fail("on_before_engine_init", ValueError("boom"), on="worker 1")
    outcome = run_stack(failing, engine_processes=["engine core", "worker 1"])
    error = outcome.assert_failed()
    assert error.process == "worker 1"
    assert str(error).startswith(
        "callback 'Fail' failed in hook on_before_engine_init on node node-1 (10.0.0.1), worker 1 "
        "(phase: before engine init): ValueError: boom; fix the callback"
    )


def test_a_download_says_itself_what_to_do(run_stack: RunStack) -> None:
    cause = DownloadError("cannot list s3://b: 403 Forbidden; check the credentials")
    run_stack(step("a", error=cause)).assert_failed(rf"403 Forbidden; check the credentials{ONCE}$")


def test_a_failure_stops_the_chain(run_stack: RunStack) -> None:
    outcome = run_stack([step("a"), step("b", error=ValueError("boom")), step("c")])
    outcome.assert_failed(callback="b")
    outcome.assert_order(["replica: on_before_init: a", "replica: on_before_init: b (failed)"])


def test_on_error_warn_goes_on_with_the_next(run_stack: RunStack) -> None:
    stack = [step("a", error=ValueError("boom"), on_error="warn"), step("b", result=Handled("/"))]
    outcome = run_stack(stack).assert_succeeded()
    assert outcome.model_path == "/"
    outcome.assert_order(
        ["replica: on_before_init: a (warned)", "replica: on_before_init: b (handled)"]
    )


def test_on_error_warn_logs_with_traceback(
    run_stack: RunStack, caplog: pytest.LogCaptureFixture
) -> None:
    with hook_log(caplog):
        run_stack(step("a", error=ValueError("boom"), on_error="warn")).assert_succeeded()
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert record.getMessage().startswith(
        "callback 'a' failed in hook on_before_init on node node-1"
    )
    assert record.getMessage().endswith("(on_error: warn, going on)")
    assert record.exc_info is not None
    assert repr(record.exc_info[1]) == "ValueError('boom')"
    assert "Traceback (most recent call last):" in caplog.text


def test_on_error_warn_also_forgives_a_wrong_result(run_stack: RunStack) -> None:
    stack = [step("a", result=True, on_error="warn"), step("b", result=Handled("/"))]
    assert run_stack(stack).assert_succeeded().model_path == "/"


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


def test_the_stack_says_what_an_entry_does_not(run_stack: RunStack) -> None:
    failing = step("a", error=ValueError("boom")) | {"on_error": None}
    run_stack(failing, on_error="warn").assert_succeeded()
    run_stack(failing, on_error="raise").assert_failed("boom")


def test_an_entry_overrules_the_stack(run_stack: RunStack) -> None:
    failing = step("a", error=ValueError("boom"), on_error="raise")
    run_stack(failing, on_error="warn").assert_failed("boom")


SECRET = "abcd-efgh-1"


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
IN_ENVIRONMENT = ModelConfig(runtime_env={"env_vars": {"HF_TOKEN": SECRET}})
BY_CONTEXT: tuple[Any, Any] = ({"callback": LEAKS}, IN_ENVIRONMENT)
BY_KWARGS: tuple[Any, Any] = ({"callback": Token, "kwargs": {"hf_token": SECRET}}, ModelConfig())
leaking = pytest.mark.parametrize(("callback", "config"), [BY_CONTEXT, BY_KWARGS])


@leaking
def test_a_secret_reaches_no_error_and_no_cause(
    run_stack: RunStack, callback: dict[str, object], config: ModelConfig
) -> None:
    raised = run_stack(callback, config).assert_failed()
    for found in (raised, pickle.loads(pickle.dumps(raised))):
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
    run_stack: RunStack,
    callback: dict[str, Any],
    config: ModelConfig,
    hook: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cls = type("Leaks", (callback["callback"],), {"on_before_init": nothing, hook: leaks})
    failing = {**callback, "callback": cls, "on_error": "warn"}
    with hook_log(caplog):
        run_stack([failing, Fail("on_engine_ready")], config).assert_failed(callback="Fail")
    assert "ValueError: 401 for ***" in caplog.text
    assert SECRET not in caplog.text
    assert "Traceback (most recent call last):" in caplog.text


def nothing(self: object, ctx: CallbackCtx) -> None:
    pass


def test_a_secret_of_custom_data_reaches_no_log(
    run_stack: RunStack, caplog: pytest.LogCaptureFixture
) -> None:
    def keeps(self: object, ctx: CallbackCtx) -> None:
        ctx.custom_data["password"] = SECRET

    keeping = type("Keeps", (), {"on_before_init": keeps, CLEAN_UP: leaks})
    with hook_log(caplog):
        run_stack([keeping, Fail("on_engine_ready")]).assert_failed(callback="Fail")
    assert "ValueError: 401 for ***" in caplog.text
    assert SECRET not in caplog.text


class OnClass:
    hf_token = SECRET
    on_before_init = leaks


class Slotted:
    __slots__ = ("hf_token",)

    def __init__(self) -> None:
        self.hf_token = SECRET

    on_before_init = leaks


class Settings:
    def __init__(self) -> None:
        self.hf_token = SECRET


class Nested:
    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()

    on_before_init = leaks


class Answers(Exception):  # noqa: N818 - as a library's may be
    def __init__(self) -> None:
        self.request = {"headers": {"Authorization": SECRET}}
        super().__init__(f"401 for {SECRET}")


class Raises:
    def on_before_init(self, ctx: CallbackCtx) -> None:
        raise Answers


@pytest.mark.parametrize(
    "callback",
    [OnClass, Slotted, Nested, {"callback": Nested, "kwargs": {"settings": Settings()}}, Raises],
    ids=["class attribute", "slot", "attribute", "argument", "attribute of the error"],
)
def test_a_secret_is_known_whatever_holds_it(run_stack: RunStack, callback: object) -> None:
    error = run_stack(callback).assert_failed("401 for [*]{3}")
    assert SECRET not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    ("made", "advice"),
    [
        ({"on_error": "raise"}, "; fix the callback, or set 'on_error: warn' on it to go on"),
        ({"on_error": "warn"}, "; fix the callback (on_error: warn, going on)"),
        ({"hook": CLEAN_UP}, "; fix the callback"),
    ],
)
def test_on_error_is_advised_where_it_helps_and_is_not_set(
    run_stack: RunStack, made: Any, advice: str
) -> None:
    failing = step("a", error=ValueError("boom"), **made)
    outcome = run_stack([failing, Fail("on_engine_ready")])
    said = [*outcome.log, str(outcome.error)]
    text = next(text for text in said if "callback 'a' failed" in text)
    assert f"ValueError: boom{advice}" in text
    assert text.count("on_error") == (made.get("hook") != CLEAN_UP)


def test_on_error_is_not_advised_for_what_no_config_names() -> None:
    class Failing:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            raise ValueError("boom")

    manager = make_manager()
    manager.register(Failing(), "mine")
    with pytest.raises(HookError, match=r"ValueError: boom; fix the callback$"):
        manager.hook.on_before_init(ctx=make_ctx())


def test_on_error_is_not_advised_for_what_says_itself_what_to_do(run_stack: RunStack) -> None:
    asking = step("a", error=CallbackConfigError("no such callback; name another"))
    run_stack(asking).assert_failed(rf"no such callback; name another{ONCE}$")


def test_a_name_is_no_secret_whatever_the_environment_holds(run_stack: RunStack) -> None:
    class Stores:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            raise RuntimeError("no Stores, no on_before_init") from inner

    inner = hook_error_of("Stores")
    environment = {"AUTH_BACKEND": "Stores", "A_PASSWORD": "before_init"}
    error = run_stack(Stores, environment=environment).assert_failed()
    shown = "".join(traceback.format_exception(error))
    assert shown.count("callback 'Stores' failed in hook on_before_init") == 2
    assert "***" not in shown.replace("AUTH_BACKEND", "")


def hook_error_of(name: str) -> HookError:
    return HookError(
        callback=name, hook="on_before_init", node="n", phase=Phase.PLACEMENT, detail=""
    )


def test_a_secret_reaches_neither_the_context_nor_the_trace(run_stack: RunStack) -> None:
    def sets(self: object, ctx: CallbackCtx) -> None:
        ctx.runtime_env["env_vars"] = {"HF_TOKEN": SECRET}
        ctx.extra_init_kwargs["api_key"] = SECRET
        ctx.custom_data["stores"] = [{"password": SECRET}]

    outcome = run_stack(type("Sets", (), {"on_before_init": sets})).assert_succeeded()
    ctx, trace = outcome.ctx, outcome.trace
    assert SECRET not in repr(ctx) + repr(trace) + trace.table() + repr(list(trace))
    assert len(outcome.changes) == 3


def test_a_cause_without_a_secret_is_the_very_exception() -> None:
    cause = ValueError("boom")
    with pytest.raises(HookError) as caught:
        call(step("a", error=cause), ctx=make_ctx(custom_data={"password": SECRET}))
    assert caught.value.__cause__ is cause
