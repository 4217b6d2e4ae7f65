"""Ray's engine with what callbacks do when it is up, and when it ends; it is in the replica."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster._ray import VLLMEngine
from rayserve_hooks.cluster.replica_life import longest_s, shut_down, started
from rayserve_hooks.cluster.slot import HooksCallback, raise_reported
from rayserve_hooks.errors import HooksError

if TYPE_CHECKING:
    from rayserve_hooks.cluster.supervision import Initialization


class HooksEngine(VLLMEngine):
    """An engine that runs the hooks from its start on; ``RAYLLM_VLLM_ENGINE_CLS`` names it.

    Its base is the class that the replica would have without it.
    """

    # Names that no base has.
    _hooks_starting: asyncio.Task[None] | None = None
    _hooks_up: Initialization | None = None

    async def start(self) -> None:
        """Start the engine, and report ready when ``on_engine_ready`` has run."""
        callback = self.llm_config.get_or_create_callback()
        if _ray.engine_runs(self) or not isinstance(callback, HooksCallback):
            await super().start()
            return
        try:
            this = callback.begin()
            self._hooks_starting = asyncio.ensure_future(_start(self, this, super().start()))
            await self._hooks_starting
        except HooksError as error:
            raise_reported(error)  # not in a context manager, which gives an error its frames back
        finally:
            self._hooks_starting = None
        this.log_ready()
        self._hooks_up = this

    async def shutdown(self) -> None:
        """Run ``on_shutdown`` of an engine that has been ready, and stop it.

        One that is still starting is cancelled, so that its callbacks clean up.
        """
        if self._hooks_starting is not None:
            self._hooks_starting.cancel()
            longest = longest_s(_ray.grace_s(self.llm_config))  # type: ignore[arg-type] # or Ray's
            await asyncio.wait([self._hooks_starting], timeout=longest)
        this, self._hooks_up = self._hooks_up, None
        if this is not None:
            await shut_down(this, _ray.grace_s(this.ctx.llm_config))
        await super().shutdown()


async def _start(engine: HooksEngine, this: Initialization, start: Awaitable[None]) -> None:
    """Await the engine's start, and stop what it has started if it fails."""
    try:
        await started(this, start, lambda: _ray.engine_client(engine))
    except BaseException:
        _ray.stop_engine(engine)
        raise
