"""What a simulated start returns: the whole story, and what a test asserts on."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.testing import Fail, RunStack


class Sets:
    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.extra_init_kwargs["max_model_len"] = 64
        ctx.custom_data["api_key"] = "sk-0123456789"

    def on_before_download(self, ctx: CallbackCtx) -> str:
        return "an/id"


STORY = """\
<Outcome: failed after 4 calls>

replica: on_before_init: Sets
    extra_init_kwargs.max_model_len: <absent> -> 64
    custom_data.api_key: <absent> -> ***
replica: on_before_download: Sets (handled)
replica: on_before_download: Fail (skipped): 'Sets' took over
replica: on_after_init: Fail (failed)

engine_kwargs: max_model_len
model_path: an/id
custom_data: api_key
node-1: an/id, brought by Sets

"""


def test_the_repr_is_the_whole_story(run_stack: RunStack) -> None:
    failing = {"callback": Fail("on_after_init", OSError("no space")), "name": "Fail"}
    skipped = {"callback": Fail("on_before_download"), "name": "Late"}
    story = repr(run_stack([Sets, failing, skipped]))
    assert story.startswith(STORY.replace("Fail (skipped)", "Late (skipped)"))
    assert "OSError: no space" in story
    assert story.splitlines()[-1].startswith(
        "rayserve_hooks.errors.HookError: callback 'Fail' failed in hook on_after_init"
    )
    assert "sk-0123456789" not in story
    assert "asyncio" not in story, "frames that lead to ours say nothing to whoever wrote it"


def test_calls_can_be_chosen(run_stack: RunStack) -> None:
    outcome = run_stack([Sets, {"callback": Sets, "name": "again"}], nodes=2)
    assert {call.callback for call in outcome.calls("again")} == {"again"}
    assert len(outcome.calls(hook="on_before_init")) == 2
    assert {call.node_id for call in outcome.calls("Sets", node="node-2")} == {"node-2"}
    assert {call.role for call in outcome.calls(process="node")} == {"node"}


def test_changes_name_who_made_them(run_stack: RunStack) -> None:
    assert run_stack([Sets]).changes == [
        "Sets: extra_init_kwargs.max_model_len: <absent> -> 64",
        "Sets: custom_data.api_key: <absent> -> ***",
    ]


class Says:
    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.log.warning("Says: half done")

    def on_after_init(self, ctx: CallbackCtx) -> None:
        ctx.log.info("done")


def test_what_one_callback_has_logged(run_stack: RunStack) -> None:
    outcome = run_stack([Says, {"callback": Says, "name": "again: Says"}])
    assert outcome.logged("Says") == ["WARNING: Says: half done", "INFO: done"]
    assert outcome.logged("half done") == outcome.logged("nobody") == []


@pytest.mark.parametrize(
    ("stack", "check", "text"),
    [
        ([Fail("on_after_init")], lambda o: o.assert_succeeded(), "the start failed"),
        ([Sets], lambda o: o.assert_failed(), "the start did not fail"),
        (
            [Fail("on_after_init")],
            lambda o: o.assert_failed(callback="Sets"),
            "it is not callback 'Sets' that failed",
        ),
        (
            [Fail("on_after_init")],
            lambda o: o.assert_failed(hook="on_before_init"),
            "it is not in on_before_init that it failed",
        ),
        (
            [Fail("on_after_init")],
            lambda o: o.assert_failed("no space"),
            "the error's text does not match 'no space'",
        ),
        (
            [Sets],
            lambda o: o.assert_order(["replica: on_before_init: Sets"]),
            "the order is another one:\n  replica: on_before_init: Sets\n+ replica: on_before_down",
        ),
    ],
)
def test_a_failed_check_tells_the_whole_story(
    run_stack: RunStack, stack: list[Any], check: Any, text: str
) -> None:
    outcome = run_stack(stack)
    with pytest.raises(pytest.fail.Exception, match=f"^{re.escape(text)}") as caught:
        check(outcome)
    assert str(caught.value).endswith(repr(outcome))


def test_a_check_that_holds_returns_what_is_looked_at_next(run_stack: RunStack) -> None:
    outcome = run_stack([Sets])
    assert outcome.assert_succeeded() is outcome
    assert outcome.assert_order(outcome.order) is outcome
    failed = run_stack([Fail("on_after_init")])
    assert failed.assert_failed() is failed.error
