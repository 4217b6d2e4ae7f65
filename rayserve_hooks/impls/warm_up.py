"""Send real requests through the engine before the replica reports ready."""

from __future__ import annotations

import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.arguments import checked_arguments

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient


class WarmUp:
    """Generate a few tokens, so that the first user does not wait for what is made lazily.

    Args:
        requests: How many requests, all sent at once. Default: 1.
        prompt: What each of them asks. Default: ``"Hello"``.
        max_tokens: Of each answer, which is this long also where the model would end earlier.
            Default: 8.
        timeout_s: After how many seconds it is given up. Default: 60.
        on_failure: ``"warn"`` logs what failed, and the replica becomes ready; ``"raise"`` ends its
            start. Default: ``"warn"``.

    Raises:
        CallbackConfigError: An argument is wrong; the message names each one.
    """

    @checked_arguments
    def __init__(
        self,
        requests: Annotated[int, Field(gt=0)] = 1,
        prompt: Annotated[str, Field(min_length=1)] = "Hello",
        max_tokens: Annotated[int, Field(gt=0)] = 8,
        timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0,
        on_failure: Literal["warn", "raise"] = "warn",
    ) -> None:
        self.requests = requests
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.timeout_s = timeout_s
        self.on_failure = on_failure

    async def on_engine_ready(self, ctx: CallbackCtx) -> None:
        import asyncio

        started = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout_s):
                tokens = await _on_loop_of(ctx.engine, self._send(ctx.engine))
        except Exception as error:
            if self.on_failure == "raise":
                raise
            why = f"{type(error).__name__}: {error}"
            if isinstance(error, TimeoutError):
                why = f"no answer within {self.timeout_s:g} s, which is timeout_s"
            ctx.log.warning(
                "the engine was not warmed up: %s; the replica becomes ready all the same, unless "
                "on_failure is 'raise'",
                why,
            )
            return
        seconds = time.perf_counter() - started
        text = "warmed up: %d requests, %d tokens in %.3f s"
        ctx.log.info(text, self.requests, tokens, seconds, extra={"seconds": seconds})

    async def _send(self, engine: EngineClient) -> int:
        """Return how many tokens all requests together brought."""
        import asyncio

        requests = (self._generate(engine, number) for number in range(self.requests))
        return sum(await asyncio.gather(*requests))

    async def _generate(self, engine: EngineClient, number: int) -> int:
        """Return how many tokens one request brought."""
        from vllm import SamplingParams

        limits = SamplingParams(max_tokens=self.max_tokens, ignore_eos=True)
        tokens = 0
        async for output in engine.generate(self.prompt, limits, f"warm_up-{number}"):
            tokens = sum(len(each.token_ids) for each in output.outputs)
        return tokens


async def _on_loop_of(engine: EngineClient, coroutine: Coroutine[Any, Any, int]) -> int:
    """Await on the replica's event loop, to which the engine's client belongs.

    Hooks run on another one, so that what a callback does cannot block the replica.
    """
    import asyncio

    handler = getattr(engine, "output_handler", None)  # vLLM's own task
    if handler is None:
        return await coroutine
    return await asyncio.wrap_future(
        asyncio.run_coroutine_threadsafe(coroutine, handler.get_loop())
    )
