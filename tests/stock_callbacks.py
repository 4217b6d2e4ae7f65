"""Callbacks for Ray's own slot that write down what they see; all behave in a way of their own."""

from __future__ import annotations

import asyncio
import json
from collections import UserDict, defaultdict
from pathlib import Path
from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase, CallbackCtx
from ray.llm._internal.common.utils.download_utils import NodeModelDownloadable


class Writes(CallbackBase):
    """Writes a line for each call: the method, the node, and what else is given."""

    def write(self, method: str, *seen: Any) -> None:
        import ray

        line = json.dumps([method, ray.get_runtime_context().get_node_id(), *seen])
        with Path(self.kwargs["log"]).open("a") as file:
            file.write(f"{line}\n")

    async def on_before_node_init(self) -> None:
        self.write("before", self.seen())

    def on_before_download_model_files_distributed(self) -> None:
        self.write("download", self.seen())

    async def on_after_node_init(self) -> None:
        self.write("after", self.seen())

    def seen(self) -> Any:
        return None


class SeesItsContext(Writes):
    def seen(self) -> Any:
        ctx: Any = self.ctx
        return [
            ctx.worker_node_download_model.name,
            len(ctx.placement_group.bundle_specs),
            sorted(ctx.runtime_env),
            ctx.custom_data,
            ctx.run_init_node,
            self.raise_error_on_callback,
            self.llm_config.model_id,
            sorted(self.kwargs),
        ]


class PlainMethods(Writes):
    def on_before_node_init(self) -> None:  # type: ignore[override]
        self.write("before", asyncio.get_running_loop().is_running())

    def on_after_node_init(self) -> None:  # type: ignore[override]
        self.write("after", asyncio.get_running_loop().is_running())


class AsyncDownload(Writes):
    async def on_before_download_model_files_distributed(self) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        self.write("download", "awaited")


class StateOnSelf(Writes):
    async def on_before_node_init(self) -> None:
        self.state = {"step": 1}
        self.also = self.state

    def seen(self) -> Any:
        self.also["step"] += 0
        return [self.state, self.also is self.state]


class StateOnContext(Writes):
    async def on_before_node_init(self) -> None:
        self.ctx.custom_data["step"] = 1
        self.ctx.of_its_own = ["a"]  # type: ignore[attr-defined]

    def seen(self) -> Any:
        return [self.ctx.custom_data, self.ctx.of_its_own]  # type: ignore[attr-defined]


class StateByGetState(Writes):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.client: Any = asyncio.Lock()
        self.lock: Any = (number for number in (1, 2))

    def __getstate__(self) -> Any:
        return {**self.__dict__, "lock": None}

    def on_before_download_model_files_distributed(self) -> None:
        self.write("download", type(self.client).__name__)


class NamesOneObjectTwice(Writes):
    async def on_before_node_init(self) -> None:
        self.steps: list[str] = []
        self.ctx.custom_data["nested"] = {"steps": self.steps}

    def on_before_download_model_files_distributed(self) -> None:
        self.steps.append("download")
        self.write("download", self.ctx.custom_data)


class KeysOfAnyKind(Writes):
    async def on_before_node_init(self) -> None:
        self.ctx.custom_data[0] = "zero"  # type: ignore[index]
        self.ctx.custom_data["b"] = "text"

    def seen(self) -> Any:
        return sorted(map(repr, self.ctx.custom_data.items()))


class AssignsCustomData(Writes):
    async def on_before_node_init(self) -> None:
        self.ctx.custom_data["gone"] = 1
        self.ctx.custom_data = {"kept": 2}

    def seen(self) -> Any:
        return self.ctx.custom_data


class CustomDataOfOtherKinds(Writes):
    async def on_before_node_init(self) -> None:
        self.ctx.custom_data = defaultdict(list)
        self.ctx.custom_data["a"].append(1)

    def seen(self) -> Any:
        return [type(self.ctx.custom_data).__name__, self.ctx.custom_data]


class CustomDataThatIsNoDict(Writes):
    async def on_before_node_init(self) -> None:
        self.ctx.custom_data = None  # type: ignore[assignment]

    async def on_after_node_init(self) -> None:
        self.write("after", self.seen())
        self.ctx.custom_data = ["a"]  # type: ignore[assignment]

    def seen(self) -> Any:
        return self.ctx.custom_data


class CustomDataLikeADict(Writes):
    async def on_before_node_init(self) -> None:
        self.ctx.custom_data = UserDict({"a": 1})  # type: ignore[assignment]

    def seen(self) -> Any:
        return [type(self.ctx.custom_data).__name__, self.ctx.custom_data["a"]]


class ClearsCustomData(Writes):
    async def on_before_node_init(self) -> None:
        self.ctx.custom_data["a"] = 1
        self.ctx.custom_data.clear()

    def seen(self) -> Any:
        return self.ctx.custom_data


class NoRuntimeEnv(Writes):
    async def on_before_node_init(self) -> None:
        self.ctx.runtime_env = None

    def seen(self) -> Any:
        return self.ctx.runtime_env


class AddsVariables(Writes):
    async def on_before_node_init(self) -> None:
        assert self.ctx.runtime_env is not None
        self.ctx.runtime_env["env_vars"]["OF_A_STOCK_CALLBACK"] = "1"

    def on_before_download_model_files_distributed(self) -> None:
        self.write("download", __import__("os").environ.get("OF_A_STOCK_CALLBACK"))


class SetsMode(Writes):
    """Sets the mode that its argument names; None where there is none."""

    async def on_before_node_init(self) -> None:
        mode = self.kwargs.get("mode")
        self.ctx.worker_node_download_model = mode and NodeModelDownloadable[mode]

    def seen(self) -> Any:
        mode: Any = self.ctx.worker_node_download_model
        return None if mode is None else mode.name


class TakesOver(Writes):
    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = 0  # type: ignore[assignment]

    def seen(self) -> Any:
        return self.ctx.run_init_node


class TakesOverWhenBuilt(Writes):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ctx.run_init_node = False


class ReplacesItsContext(Writes):
    async def on_before_node_init(self) -> None:
        group, env = self.ctx.placement_group, self.ctx.runtime_env
        self.ctx = CallbackCtx(placement_group=group, runtime_env=env, custom_data={"new": 1})

    def seen(self) -> Any:
        return self.ctx.custom_data


class FailsBefore(Writes):
    async def on_before_node_init(self) -> None:
        self.ctx.custom_data["set"] = True
        self.ctx.run_init_node = False
        raise KeyError("before")

    def seen(self) -> Any:
        return self.ctx.custom_data


class FailsInDownload(Writes):
    def on_before_download_model_files_distributed(self) -> None:
        self.write("download")
        raise ValueError("download")


class FailsAfter(Writes):
    async def on_after_node_init(self) -> None:
        self.write("after")
        raise RuntimeError("after")


class FailsWhenBuilt(Writes):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        raise RuntimeError("built")


class AlwaysRaises(FailsBefore):
    def __init__(self, *, raise_error_on_callback: bool, **kwargs: Any) -> None:
        super().__init__(raise_error_on_callback=True, **kwargs)


class NeverRaises(FailsBefore):
    def __init__(self, llm_config: Any, **kwargs: Any) -> None:
        super().__init__(llm_config, **{**kwargs, "raise_error_on_callback": False})


class ChangesItsMind(FailsAfter):
    async def on_before_node_init(self) -> None:
        self.raise_error_on_callback = not self.raise_error_on_callback


class SettlesItself(FailsBefore):
    def _handle_callback_error(self, method_name: str, e: Exception) -> None:
        self.write("failed", method_name, repr(e))


class RunsItself(Writes):
    async def run_callback(self, method_name: str) -> None:
        self.write("run", method_name)
        await super().run_callback(method_name)

    def run_callback_sync(self, method_name: str) -> None:
        self.write("run", method_name)
        super().run_callback_sync(method_name)


class RunsNothing(Writes):
    async def run_callback(self, method_name: str) -> None:
        self.write("run", method_name)


class FailsToRun(Writes):
    async def run_callback(self, method_name: str) -> None:
        raise OSError(method_name)


class TakesArguments(Writes):
    def __init__(
        self,
        llm_config: Any,
        raise_error_on_callback: bool = True,
        ctx_kwargs: dict[str, Any] | None = None,
        *,
        numbers: tuple[int, ...] = (1, 2),
        **kwargs: Any,
    ) -> None:
        self.given = sorted(ctx_kwargs or {})
        self.numbers = numbers
        super().__init__(llm_config, raise_error_on_callback, ctx_kwargs, **kwargs)

    def seen(self) -> Any:
        return [self.given, self.numbers]


class DoesNotPickle(Writes):
    async def on_before_node_init(self) -> None:
        self.opened = (number for number in (1, 2))


class ContextDoesNotPickle(Writes):
    async def on_before_node_init(self) -> None:
        self.ctx.opened = (number for number in (1, 2))  # type: ignore[attr-defined]


class DoesNotPickleAndIsNotNeeded(CallbackBase):
    async def on_before_node_init(self) -> None:
        self.opened = (number for number in (1, 2))
