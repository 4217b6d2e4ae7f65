"""What a type checker says of callbacks and their context; `tests/test_typing.py` compares.

A line that ends with a comment ``error: ...`` must have one error, whose text contains that; every
other line must have none. This file is checked and never run.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from rayserve_hooks import (
    CallbackCtx,
    Handled,
    HookError,
    NodeModelDownloadable,
    RayServeLLMCallback,
    hookimpl,
)
from rayserve_hooks.context import NodeInfo, NodeResult
from rayserve_hooks.trace import Trace


class OneHook(RayServeLLMCallback):
    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.extra_init_kwargs["max_model_len"] = 4096


class NoHook(RayServeLLMCallback):
    pass


class AllHooks(RayServeLLMCallback):
    def __init__(self, bucket: str) -> None:
        self.bucket = bucket

    def on_before_init(self, ctx: CallbackCtx) -> Handled | None:
        return Handled(reason=self.bucket)

    def on_before_download(self, ctx: CallbackCtx) -> Path:
        return Path("/models") / self.bucket

    def on_after_init(self, ctx: CallbackCtx) -> None:
        pass

    def on_init_failed(self, ctx: CallbackCtx, error: BaseException) -> None:
        if isinstance(error, HookError) and error.callback is not None:
            ctx.custom_data["failed"] = error.callback


class NoBase:
    def on_before_download(self, ctx: CallbackCtx) -> str:
        return "/models/m"


class Async(RayServeLLMCallback):
    async def on_before_init(self, ctx: CallbackCtx) -> Handled:
        return Handled("/models/m")

    async def on_before_download(self, ctx: CallbackCtx) -> str | None:
        return None

    @hookimpl(trylast=True)
    async def on_after_init(self, ctx: CallbackCtx) -> None:
        pass

    async def on_init_failed(self, ctx: CallbackCtx, error: BaseException) -> None:
        pass


class Wraps(RayServeLLMCallback):
    @hookimpl(wrapper=True, tryfirst=True)
    def on_before_init(self, ctx: CallbackCtx) -> Generator[None, Handled | None, Handled | None]:
        return (yield)

    @hookimpl(wrapper=True)
    def on_before_download(self, ctx: CallbackCtx) -> Generator[None, Any, Handled]:
        yield
        return Handled(Path("/models/m"), "wrapped")

    @hookimpl(wrapper=True)
    def on_after_init(self, ctx: CallbackCtx) -> Generator[None, object, None]:
        yield


class Results(RayServeLLMCallback):
    def on_before_download(self, ctx: CallbackCtx) -> Handled | str | os.PathLike[str] | None:
        return None


class Static(RayServeLLMCallback):
    @hookimpl(tryfirst=True)
    @staticmethod
    def on_before_init(ctx: CallbackCtx) -> None:
        pass


class WrongResult(RayServeLLMCallback):
    def on_before_init(self, ctx: CallbackCtx) -> bool:  # error: Return type "bool"
        return True


class PathTooEarly(RayServeLLMCallback):
    def on_before_init(self, ctx: CallbackCtx) -> Path:  # error: Return type "Path"
        return Path("/models/m")


class ResultTooLate(RayServeLLMCallback):
    def on_after_init(self, ctx: CallbackCtx) -> Handled:  # error: Return type "Handled"
        return Handled()


class NoCtx(RayServeLLMCallback):
    def on_before_init(self) -> None:  # error: Signature of "on_before_init" incompatible
        pass


class AnotherArgument(RayServeLLMCallback):
    def on_before_init(self, ctx: CallbackCtx, node: str) -> None:  # error: incompatible
        pass


callbacks: list[RayServeLLMCallback] = [OneHook(), NoHook(), AllHooks("b"), Async(), Wraps()]
callbacks.append(Static())
callbacks.append(NoBase())  # error: incompatible type "NoBase"; expected "RayServeLLMCallback"
anything: list[object] = [NoBase, NoBase(), {"callback": OneHook, "name": "one"}, "pkg:Class"]


def made_by_hand() -> CallbackCtx:
    CallbackCtx(llm_config=1, runtim=3)  # error: Unexpected keyword argument "runtim"
    CallbackCtx()  # error: Missing named argument "llm_config"
    CallbackCtx(object())  # error: Too many positional arguments
    CallbackCtx(llm_config=1, local_node_download_model="NOEN")  # error: "Literal['NOEN']"
    return CallbackCtx(
        llm_config=object(),
        node=NodeInfo("n1", "10.0.0.1", is_local=True),
        local_node_download_model="NONE",
        worker_node_download_model=NodeModelDownloadable.TOKENIZER_ONLY,
        placement_group=None,
        runtime_env={"env_vars": {"A": "1"}},
        extra_init_kwargs={},
        custom_data={"mine": object()},
        nodes={},
        handled=Handled("/models/m"),
    )


def only_the_config() -> CallbackCtx:
    return CallbackCtx(llm_config=object())


def reads(ctx: CallbackCtx) -> None:
    local: NodeModelDownloadable = ctx.local_node_download_model
    worker: NodeModelDownloadable = ctx.worker_node_download_model
    environment: dict[str, Any] = ctx.runtime_env
    arguments: dict[str, Any] = ctx.extra_init_kwargs
    data: dict[str, Any] = ctx.custom_data
    node: NodeInfo = ctx.node
    nodes: Mapping[str, NodeResult] = ctx.nodes
    handled: Handled | None = ctx.handled
    trace: Trace = ctx.trace
    ctx.log.info("on %s", node, extra={"mine": 1})
    ctx.log.inof("on")  # error: has no attribute "inof"
    model_id: str = ctx.llm_config.model_id
    if ctx.placement_group is not None:
        print(ctx.placement_group.bundle_specs)
    print(local, worker, environment, arguments, data, node, nodes, handled, trace, model_id)
    print(ctx.nope)  # error: "CallbackCtx" has no attribute "nope"
    print(ctx.custom_date)  # error: has no attribute "custom_date"
    mode: str = ctx.local_node_download_model  # error: Incompatible types in assignment
    print(mode, ctx.node.ip)  # error: "NodeInfo" has no attribute "ip"


def writes(ctx: CallbackCtx) -> None:
    ctx.local_node_download_model = "NONE"
    ctx.local_node_download_model = "TOKENIZER_ONLY"
    ctx.worker_node_download_model = "EXCLUDE_SAFETENSORS"
    ctx.worker_node_download_model = "MODEL_AND_TOKENIZER"
    ctx.worker_node_download_model = NodeModelDownloadable.NONE
    ctx.local_node_download_model = ctx.worker_node_download_model
    ctx.placement_group = None
    ctx.runtime_env = {"env_vars": {"A": "1"}}
    ctx.runtime_env["env_vars"]["B"] = "2"
    ctx.extra_init_kwargs = {"max_model_len": 4096}
    ctx.extra_init_kwargs["max_model_len"] = 4096
    ctx.custom_data = {"mine": 1}
    ctx.custom_data["mine"] = [1]
    ctx.nodes["n1"] = ctx.nodes["n2"]  # error: Unsupported target for indexed assignment
    ctx.runtime_envv = {}  # error: has no attribute "runtime_envv"
    ctx.local_node_download_model = "NOEN"  # error: Incompatible types in assignment
    ctx.worker_node_download_model = "none"  # error: Incompatible types in assignment
    ctx.local_node_download_model = None  # error: Incompatible types in assignment
    ctx.local_node_download_model = True  # error: Incompatible types in assignment
    ctx.runtime_env = None  # error: Incompatible types in assignment
    ctx.extra_init_kwargs = [("a", 1)]  # error: Incompatible types in assignment
    ctx.custom_data = {1: "a"}  # error: Dict entry 0 has incompatible type
    ctx.llm_config = object()  # error: Property "llm_config" defined in "CallbackCtx" is read-only
    ctx.node = ctx.nodes["n1"].node  # error: Property "node" defined in "CallbackCtx" is read-only
    ctx.nodes = {}  # error: Property "nodes" defined in "CallbackCtx" is read-only
    ctx.handled = None  # error: Property "handled" defined in "CallbackCtx" is read-only
    ctx.log = ctx.log  # error: Property "log" defined in "CallbackCtx" is read-only
    ctx.trace = Trace()  # error: Property "trace" defined in "CallbackCtx" is read-only
    del ctx.custom_data["mine"]


async def fetch(bucket: str) -> Path:
    return Path(bucket)


def in_the_background(ctx: CallbackCtx) -> None:
    text: Future[str] = ctx.run_in_background(str.upper, "a")
    path: Future[Path] = ctx.run_in_background(fetch, "bucket")
    print(text.result().upper(), path.result().name)
    number: Future[int] = ctx.run_in_background(fetch, "bucket")  # error: Argument 1
    print(number)


def results() -> None:
    Handled()
    Handled("/models/m")
    Handled(Path("/models/m"), reason="cached")
    Handled(True)  # error: Argument 1 to "Handled" has incompatible type "bool"
    Handled(reason=None)  # error: Argument "reason" to "Handled" has incompatible type "None"
    Handled("/a").model_path = "/b"  # error: "model_path" defined in "Handled" is read-only
