"""A module is a callback, too: its functions are the hooks."""

from rayserve_hooks import CallbackCtx


def on_before_init(ctx: CallbackCtx) -> None:
    ctx.extra_init_kwargs["max_model_len"] = 192
