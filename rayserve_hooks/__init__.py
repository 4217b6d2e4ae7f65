"""Stack several callbacks on one Ray Serve LLM deployment, written like pytest plugins."""

__version__ = "0.2.0.dev0"  # a literal on top: the build reads it without importing the package

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayserve_hooks.cluster.config import LLMConfig
    from rayserve_hooks.cluster.initialize import initialize_node
    from rayserve_hooks.cluster.slot import HooksCallback
    from rayserve_hooks.cluster.stacks import get_plugin_manager
    from rayserve_hooks.context import CallbackCtx, Handled, NodeModelDownloadable
    from rayserve_hooks.errors import HookError
    from rayserve_hooks.hookspecs import RayServeLLMCallback, hookimpl, hookspec

__all__ = [
    "CallbackCtx",
    "Handled",
    "HookError",
    "HooksCallback",
    "LLMConfig",
    "NodeModelDownloadable",
    "RayServeLLMCallback",
    "__version__",
    "get_plugin_manager",
    "hookimpl",
    "hookspec",
    "initialize_node",
]

# Ray costs seconds to import, and a node's process, a callback's module and the command line need
# nothing of it: PEP 562 loads each name at its first use.
_HOMES = {
    "CallbackCtx": "context",
    "Handled": "context",
    "HookError": "errors",
    "HooksCallback": "cluster.slot",
    "LLMConfig": "cluster.config",
    "NodeModelDownloadable": "context",
    "RayServeLLMCallback": "hookspecs",
    "get_plugin_manager": "cluster.stacks",
    "hookimpl": "hookspecs",
    "hookspec": "hookspecs",
    "initialize_node": "cluster.initialize",
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
