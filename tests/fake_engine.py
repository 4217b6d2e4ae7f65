"""Engines that start in no time, in place of vLLM's: named as a user names one of their own."""

import asyncio
import os
from pathlib import Path
from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine


class Client:
    """What ``ctx.engine`` is then."""

    def shutdown(self) -> None:
        """Do as vLLM's client, which has processes to end."""


class Engine(VLLMEngine):
    """Run Ray's slot as Ray's own engine does, and start nothing."""

    async def start(self) -> None:
        callback: Any = self.llm_config.get_or_create_callback()
        await callback.run_callback("on_before_node_init")
        assert not callback.ctx.run_init_node
        await callback.run_callback("on_after_node_init")
        if "FAKE_ENGINE_HANGS" in os.environ:
            await asyncio.to_thread(_add, Path(os.environ["FAKE_ENGINE_LOG"]), "engine starting\n")
            await asyncio.Event().wait()
        if "FAKE_ENGINE_FAILS" in os.environ:
            raise RuntimeError("no memory left for the cache")
        client: Any = Client()
        self._engine_client = client
        self._running = True

    async def check_health(self) -> None:
        pass

    async def shutdown(self) -> None:
        if log := os.environ.get("FAKE_ENGINE_LOG"):
            await asyncio.to_thread(_add, Path(log), "engine stopped\n")


def _add(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


NO_ENGINE = "not a class"
