"""Whose logger ``ctx.log`` is, and what the records say besides their text."""

import asyncio
import logging
import threading
from typing import Any

import pytest
from plugins_for_tests import hook_log, make_ctx, make_manager

from rayserve_hooks.context import LOGGER_NAME, CallbackCtx
from rayserve_hooks.core.log import trace_is_wanted
from rayserve_hooks.core.recorder import recorder_of
from rayserve_hooks.core.running import with_background


class Logs:
    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.log.info("in a %s", "hook", extra={"mine": 1})

    async def on_before_download(self, ctx: CallbackCtx) -> None:
        await asyncio.sleep(0)
        ctx.log.info("in a coroutine")

    def on_after_init(self, ctx: CallbackCtx) -> None:
        ctx.run_in_background(lambda: ctx.log.info("in the background"))


class Fails:
    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["api_key"] = "s3cr3t-value"
        raise ValueError("s3cr3t-value is wrong")


@pytest.mark.parametrize("hook", ["on_before_init", "on_before_download", "on_after_init"])
def test_a_callbacks_logger_has_its_name_and_the_calls_fields(
    hook: str, caplog: pytest.LogCaptureFixture
) -> None:
    manager, ctx = make_manager({"callback": Logs, "name": "mine"}), make_ctx()

    async def run() -> None:
        getattr(manager.hook, hook)(ctx=ctx)
        await with_background(manager, ctx, asyncio.sleep(0))

    with hook_log(caplog):
        asyncio.run(run())
    (record,) = caplog.records
    fields: dict[str, Any] = vars(record)
    assert record.name == f"{LOGGER_NAME}.mine"
    assert record.filename == "test_log.py"
    assert (fields["callback"], fields["hook"], fields["node"]) == ("mine", hook, "n1")
    assert fields["phase"] == hook.removeprefix("on_").replace("_", " ")
    assert fields["seconds"] >= 0
    assert fields.get("mine") == (1 if hook == "on_before_init" else None)


def test_work_in_the_background_logs_as_the_callback_that_started_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen = threading.Event()

    class Starts:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            ctx.run_in_background(self.work, ctx)

        def work(self, ctx: CallbackCtx) -> None:
            assert seen.wait(10)
            ctx.log.info("beside another")

    class Other:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            seen.set()
            futures = [call.future for _, call in recorder_of(ctx).background]
            assert [future.exception(10) for future in futures] == [None]

    with hook_log(caplog):
        make_manager(Starts, Other).hook.on_before_init(ctx=make_ctx())
    assert [record.name for record in caplog.records] == [f"{LOGGER_NAME}.Starts"]


def test_a_context_made_by_hand_has_a_logger(caplog: pytest.LogCaptureFixture) -> None:
    with hook_log(caplog):
        CallbackCtx(llm_config=None).log.info("hello")
    assert [(record.name, record.message) for record in caplog.records] == [(LOGGER_NAME, "hello")]


def test_our_own_record_of_a_failure_has_the_fields_and_no_secret(
    caplog: pytest.LogCaptureFixture,
) -> None:
    manager = make_manager({"callback": Fails, "name": "fails", "on_error": "warn"})
    with hook_log(caplog):
        manager.hook.on_before_init(ctx=make_ctx())
    (record,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    fields = vars(record)
    assert (fields["callback"], fields["phase"], fields["node"]) == ("fails", "before init", "n1")
    assert "s3cr3t-value" not in caplog.text + str(fields)


@pytest.mark.parametrize(("value", "wanted"), [("1", True), ("0", False), ("", False)])
def test_one_variable_has_the_trace_logged(
    value: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSERVE_HOOKS_LOG_TRACE", value)
    assert trace_is_wanted() is wanted
