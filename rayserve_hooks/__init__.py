"""Stack several callbacks on one Ray Serve LLM deployment, written like pytest plugins."""

__version__ = "0.2.0.dev0"  # a literal on top: the build reads it without importing the package

import importlib
from typing import TYPE_CHECKING

from rayserve_hooks.context import CallbackCtx, Handled, NodeModelDownloadable
from rayserve_hooks.core.manager import get_plugin_manager
from rayserve_hooks.errors import HookError
from rayserve_hooks.hookspecs import RayServeLLMCallback, hookimpl, hookspec

if TYPE_CHECKING:
    from rayserve_hooks.cluster.config import LLMConfig
    from rayserve_hooks.cluster.initialize import initialize_node
    from rayserve_hooks.cluster.slot import HooksCallback

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

# Ray costs seconds to import, and a node task, a callback's module and the command line need none
# of these three: PEP 562 loads each at its first use.
_NEEDS_RAY = {
    "HooksCallback": "rayserve_hooks.cluster.slot",
    "LLMConfig": "rayserve_hooks.cluster.config",
    "initialize_node": "rayserve_hooks.cluster.initialize",
}


def __getattr__(name: str) -> object:
    if name not in _NEEDS_RAY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_NEEDS_RAY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
