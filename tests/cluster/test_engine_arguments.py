"""What needs no engine; the rest is seen in `test_initialize` and `test_end_to_end`."""

from __future__ import annotations

from typing import Any

import pytest
from plugins_for_tests import make_ctx

from rayserve_hooks.cluster.engine_arguments import Environment
from rayserve_hooks.errors import HookError, Phase


@pytest.mark.parametrize("phase", [Phase.BEFORE_INIT, Phase.ENGINE_ARGUMENTS])
def test_a_variable_that_is_no_string_is_charged_to_the_phase_it_was_set_in(phase: Phase) -> None:
    ctx = make_ctx()
    environment = Environment(ctx)
    values: dict[str, Any] = {"THREADS": 8}
    ctx.runtime_env["env_vars"] = values
    text = (
        rf"\(phase: {phase}\): ctx.runtime_env.env_vars.THREADS: TypeError: str expected, not int"
    )
    with pytest.raises(HookError, match=text):
        environment.export(phase)
