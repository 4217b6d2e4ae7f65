"""Callbacks that the tests of the command line name by string."""

from rayserve_hooks import CallbackCtx


class First:
    def on_before_init(self, ctx: CallbackCtx) -> None:
        pass

    def on_init_failed(self, ctx: CallbackCtx, error: BaseException) -> None:
        pass


class Second(First):
    pass


class Refuses(First):
    def __init__(self, hf_token: str) -> None:
        raise ValueError(f"cannot use {hf_token}")
