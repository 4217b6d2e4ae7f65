"""A callback that uses the engine before the first user does, and what it has learnt afterwards."""

import time

from rayserve_hooks import CallbackCtx


class FirstAnswer:
    """Ask the engine once, so that the first user does not wait for what it does only once.

    Args:
        prompt: What it is asked.
    """

    def __init__(self, prompt: str = "hello") -> None:
        self.prompt = prompt

    async def on_engine_ready(self, ctx: CallbackCtx) -> None:
        # Imported here: the module is imported in processes that have no engine, too.
        from vllm import SamplingParams

        started = time.monotonic()
        parameters = SamplingParams(max_tokens=1)
        async for _ in ctx.engine.generate(self.prompt, parameters, "first-answer"):
            pass
        self.seconds = time.monotonic() - started
        ctx.log.info("the first answer took %.1f s", self.seconds)

    def on_shutdown(self, ctx: CallbackCtx) -> None:
        ctx.log.info("its first answer had taken %.1f s", self.seconds)
