"""Callbacks for tests of the engine's own processes; importable in every process."""

import json
import os
import signal
import threading
from pathlib import Path

from rayserve_hooks import CallbackCtx


class Tell:
    """Write what each process of the engine sees into a file of its own."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["said"] = "before"
        ctx.custom_data["stays"] = (number for number in range(1))  # which does not pickle

    def on_after_init(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["said"] = "after"

    def on_before_engine_init(self, ctx: CallbackCtx) -> None:
        seen = {
            "process": str(ctx.process),
            "pid": os.getpid(),
            "node": ctx.node.id,
            "model_id": ctx.llm_config.model_id,
            "said": ctx.custom_data["said"],
            "stays": "stays" in ctx.custom_data,
            "nodes": {node: sorted(result.custom_data) for node, result in ctx.nodes.items()},
            "max_model_len": ctx.extra_init_kwargs.get("max_model_len"),
        }
        (Path(self.folder) / f"{os.getpid()}-{threading.get_ident()}").write_text(json.dumps(seen))


class Only:
    """Have a constructor that no process of the engine may call: it has no hook there."""

    def __init__(self, replica: int = 0) -> None:
        if "RAYSERVE_HOOKS_ENGINE_START" in os.environ:
            raise AssertionError("built in a process of the engine")

    def on_after_init(self, ctx: CallbackCtx) -> None:
        ctx.extra_init_kwargs["max_model_len"] = 256


class BindThreads:
    """Give each rank a core of its own."""

    def __init__(self, ranks: int) -> None:
        self.cores = "|".join(map(str, range(ranks)))

    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.runtime_env.setdefault("env_vars", {})["VLLM_CPU_OMP_THREADS_BIND"] = self.cores


class Trouble:
    """Fail in one of the engine's processes, or end it."""

    def __init__(self, process: str, how: str = "raise") -> None:
        self.process, self.how = process, how

    def on_before_engine_init(self, ctx: CallbackCtx) -> None:
        if str(ctx.process) != self.process:
            return
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hang":
            threading.Event().wait()
        raise RuntimeError("no such parser")


class Background:
    """Do its work beside the hooks."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_before_engine_init(self, ctx: CallbackCtx) -> None:
        ctx.run_in_background(self.file.touch)


class WriteTrace:
    """Write what has run until the engine is ready."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_engine_ready(self, ctx: CallbackCtx) -> None:
        calls = [
            (call.process, call.hook, call.callback, call.outcome, call.pid, call.node_id)
            for call in ctx.trace
        ]
        self.path.write_text(json.dumps(calls))


class ChoosePlugins:
    """Set vLLM's variable where no config shows it."""

    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.runtime_env.setdefault("env_vars", {})["VLLM_PLUGINS"] = "lora_filesystem_resolver"
