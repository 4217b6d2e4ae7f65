"""What callbacks keep where all simulated processes see it, and real ones would not."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

from rayserve_hooks.cluster.ray_callback import RayCallback
from rayserve_hooks.core.manager import PluginManager
from rayserve_hooks.core.recorder import changes_between, seen
from rayserve_hooks.testing.steps import Step

_CODE = (
    *(types.FunctionType, types.ModuleType, types.BuiltinFunctionType, type),
    *(staticmethod, classmethod, property, types.MemberDescriptorType, types.GetSetDescriptorType),
)


class SharedState:
    """The data on the classes of a stack's callbacks, and in the modules that are callbacks."""

    def __init__(self, manager: PluginManager) -> None:
        self._owners = list(_owners(manager))
        self._before = self._seen()

    def changed(self) -> list[str]:
        """Return what has changed since this was made, such as ``"MyCallback.cache.key"``."""
        return [change.path for change in changes_between(self._before, self._seen())]

    def _seen(self) -> dict[str, Any]:
        return seen({owner.__name__: dict(_data(owner)) for owner in self._owners})


def _owners(manager: PluginManager) -> Iterator[Any]:
    for _, plugin in manager.list_name_plugin():
        if isinstance(plugin, types.ModuleType):
            yield plugin
        elif not isinstance(plugin, Step | RayCallback):
            yield from type(plugin).__mro__[:-1]


def _data(owner: Any) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(owner).items()):
        if not name.startswith("__") and not isinstance(value, _CODE):
            yield name, dict.fromkeys(sorted(map(repr, value))) if isinstance(value, set) else value
