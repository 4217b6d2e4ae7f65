"""A callback whose arguments are checked where the config is made."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayserve_hooks import CallbackCtx
from rayserve_hooks.core.arguments import checked_arguments


class EngineSize:
    @checked_arguments
    def __init__(
        self,
        max_model_len: Annotated[int, Field(gt=0)],
        dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    ) -> None:
        self.engine_kwargs = {"max_model_len": max_model_len, "dtype": dtype}

    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.extra_init_kwargs.update(self.engine_kwargs)
