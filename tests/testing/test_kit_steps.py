"""The callbacks that fail, hang, die and take over at will."""

from __future__ import annotations

from typing import Any

import pytest

from rayserve_hooks.core.hooks import HOOKS
from rayserve_hooks.testing import Fail, RunStack, Step, TakeOver


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Fail("on_before_ini"), "'on_before_ini' is no hook; did you mean 'on_before_in"),
        (lambda: Fail("xyz"), f"'xyz' is no hook; use one of {', '.join(HOOKS)}"),
        (
            lambda: TakeOver("on_after_init"),
            "'on_after_init' has no result; use one of on_before_init, on_before_download",
        ),
    ],
)
def test_a_wrong_hook_is_refused(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_a_step_acts_where_and_as_often_as_it_is_told(run_stack: RunStack) -> None:
    warned = {"callback": Fail("on_before_download", on="node-2"), "on_error": "warn"}
    outcomes = [call.outcome for call in run_stack([warned], nodes=3).calls("Fail")]
    assert outcomes == ["returned", "warned", "returned"]
    once = {"callback": Fail("on_before_init", times=1), "on_error": "warn"}
    assert [run_stack([once]).order[0] for _ in range(2)] == [
        "replica: on_before_init: Fail (warned)",
        "replica: on_before_init: Fail",
    ]
    process = {"callback": Fail("on_before_init", on="replica"), "on_error": "warn"}
    assert run_stack([process]).order == ["replica: on_before_init: Fail (warned)"]


def test_an_author_can_write_one(run_stack: RunStack) -> None:
    class Slow(Step):
        def act(self, ctx: Any) -> None:
            ctx.custom_data["slow"] = True

    assert run_stack([Slow("on_after_init")]).custom_data == {"slow": True}
