"""Stack several callbacks on one Ray Serve LLM deployment, written like pytest plugins."""

__version__ = "0.2.0.dev0"  # a literal on top: the build reads it without importing the package

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayserve_hooks.cluster.builders import (
        build_dp_openai_app,
        build_openai_app,
        build_pd_openai_app,
    )
    from rayserve_hooks.cluster.config import LLMConfig
    from rayserve_hooks.cluster.driver import initialize_node
    from rayserve_hooks.cluster.sglang import SGLangServer
    from rayserve_hooks.cluster.slot import HooksCallback
    from rayserve_hooks.cluster.stacks import get_plugin_manager
    from rayserve_hooks.context import CallbackCtx, Handled, NodeModelDownloadable
    from rayserve_hooks.download.files import download_files, new_folder
    from rayserve_hooks.errors import HookError
    from rayserve_hooks.findings import Finding
    from rayserve_hooks.hookspecs import RayServeLLMCallback, hookimpl, hookspec

__all__ = [
    "CallbackCtx",
    "Finding",
    "Handled",
    "HookError",
    "HooksCallback",
    "LLMConfig",
    "NodeModelDownloadable",
    "RayServeLLMCallback",
    "SGLangServer",
    "__version__",
    "build_dp_openai_app",
    "build_openai_app",
    "build_pd_openai_app",
    "download_files",
    "get_plugin_manager",
    "hookimpl",
    "hookspec",
    "initialize_node",
    "new_folder",
]

# Ray costs seconds to import, and a node's process, a callback's module and the command line need
# nothing of it: PEP 562 loads each name at its first use.
_HOMES = {
    "CallbackCtx": "context",
    "Finding": "findings",
    "Handled": "context",
    "HookError": "errors",
    "HooksCallback": "cluster.slot",
    "LLMConfig": "cluster.config",
    "NodeModelDownloadable": "context",
    "RayServeLLMCallback": "hookspecs",
    "SGLangServer": "cluster.sglang",
    "build_dp_openai_app": "cluster.builders",
    "build_openai_app": "cluster.builders",
    "build_pd_openai_app": "cluster.builders",
    "download_files": "download.files",
    "get_plugin_manager": "cluster.stacks",
    "hookimpl": "hookspecs",
    "hookspec": "hookspecs",
    "initialize_node": "cluster.driver",
    "new_folder": "download.files",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        hint = importlib.import_module(f"{__name__}.errors").did_you_mean(name, __all__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
