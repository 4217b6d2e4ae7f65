"""The plugin manager: registration, order, one per process and deployment."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import pluggy

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core import _pluggy
from rayserve_hooks.core.calls import plain_call, wrapper_call
from rayserve_hooks.core.failures import Blame
from rayserve_hooks.core.hooks import CLEAN_UP, HOOKS
from rayserve_hooks.core.inspection import HookFunction, hook_functions
from rayserve_hooks.core.stack import CallbackStack
from rayserve_hooks.errors import CallbackConfigError, HookError
from rayserve_hooks.hookspecs import PROJECT, RayServeLLMCallback


class RegisteredCallback:
    """What pluggy gets in place of a callback: equal to itself only, its hooks as attributes.

    pluggy compares plugins with ``==`` and would take two equal instances, such as those of a
    dataclass, for one; and it offers no interception of single calls, which recording and blame
    need. `PluginManager.get_plugin`, `get_plugins` and `list_name_plugin` return it, and it is the
    ``plugin`` of every ``HookImpl``. Its ``callback`` is the callback itself.
    """

    def __init__(self, callback: object, name: str, hooks: Sequence[HookFunction]) -> None:
        for hook in hooks:
            # By specname too: pluggy 1.6 asks for the hook's name whether a plugin has the hook.
            vars(self).setdefault(hook.hook, None)
            vars(self)[hook.attribute] = hook.function
        self.callback = callback
        self.name = name
        self._options = {hook.attribute: hook.options for hook in hooks}

    def options_of(self, attribute: str) -> pluggy.HookimplOpts | None:
        """Return what ``@hookimpl`` says of a hook, or None for another attribute."""
        return self._options.get(attribute)

    def __repr__(self) -> str:
        # Not the callback's own, which may show anything.
        cls = type(self.callback)
        return f"<callback {self.name!r} of {cls.__module__}.{cls.__qualname__}>"


class PluginManager(pluggy.PluginManager):
    """A `pluggy.PluginManager` whose hooks run in list order, are traced and name who failed.

    It builds and registers the callbacks of a stack; an error names all that cannot be. Its
    methods take a callback or its `RegisteredCallback`, and return the latter.
    """

    def __init__(self, stack: CallbackStack) -> None:
        super().__init__(PROJECT)
        self.stack = stack
        self.add_hookspecs(RayServeLLMCallback)
        self._entries = {entry.name: entry for entry in stack.entries}
        # Built in list order, registered from the last: pluggy runs the last registered first.
        for entry, plugin in reversed(stack.build()):
            self.register(plugin, entry.name)
        for hook in HOOKS:
            # Cleaning up goes the other way.
            groups = ("tryfirst", "") if hook == CLEAN_UP else ("trylast",)
            _pluggy.reverse_groups(getattr(self.hook, hook), *groups)

    def register(self, plugin: Any, name: str | None = None) -> str | None:
        """Register a callback; a method named after a hook is that hook, decorated or not.

        An object that is registered already is a `CallbackConfigError`, a taken name a ValueError.
        """
        if isinstance(plugin, RegisteredCallback):
            plugin = plugin.callback
        if plugin is None:  # ignored, as in pluggy
            return None
        already = self.get_name(plugin)
        if already is not None:
            raise CallbackConfigError(
                f"callbacks {already!r} and {name!r} are the same object; name the class twice, "
                "or make two instances"
            )
        name = name or self.get_canonical_name(plugin)
        found = hook_functions(plugin, self.project_name)
        hooks = [self._instrumented(hook, name) for hook in found]
        return super().register(RegisteredCallback(plugin, name, hooks), name)

    def _instrumented(self, hook: HookFunction, name: str) -> HookFunction:
        if hook.hook not in HOOKS:
            return hook
        instrument = wrapper_call if hook.options["wrapper"] else plain_call
        return replace(hook, function=instrument(hook.function, self.blame(name, hook.hook)))

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> pluggy.HookimplOpts | None:
        if isinstance(plugin, RegisteredCallback):
            return plugin.options_of(name)
        return super().parse_hookimpl_opts(plugin, name)

    def registered(self, plugin: Any) -> RegisteredCallback | None:
        """Return the `RegisteredCallback` of a callback or of itself; None if there is none."""
        for _, found in self.list_name_plugin():
            if not isinstance(found, RegisteredCallback):
                continue  # a blocked name
            if found is plugin or found.callback is plugin:
                return found
        return None

    # pluggy compares with ``==``, which would run what is not registered; so only ours go there.

    def get_name(self, plugin: Any) -> str | None:
        found = self.registered(plugin)
        return None if found is None else super().get_name(found)

    def is_registered(self, plugin: Any) -> bool:
        return self.registered(plugin) is not None

    def unregister(self, plugin: Any = None, name: str | None = None) -> Any | None:
        return super().unregister(self.registered(plugin) or plugin, name)

    def get_hookcallers(self, plugin: Any) -> list[pluggy.HookCaller] | None:
        found = self.registered(plugin)
        return None if found is None else super().get_hookcallers(found)

    def subset_hook_caller(self, name: str, remove_plugins: Iterable[Any]) -> pluggy.HookCaller:
        found = (self.registered(plugin) for plugin in remove_plugins)
        return super().subset_hook_caller(name, [plugin for plugin in found if plugin is not None])

    def run_order(self) -> dict[str, list[str]]:
        """Return each hook's callbacks in the order in which they run, wrappers outermost first."""
        return {
            hook: [impl.plugin_name for impl in reversed(getattr(self.hook, hook).get_hookimpls())]
            for hook in HOOKS
        }

    def warns(self, callback: str) -> bool:
        """Return whether a callback's failure is only logged."""
        entry = self._entries.get(callback)
        return ((entry and entry.on_error) or self.stack.on_error) == "warn"

    def blame(self, callback: str, hook: str) -> Blame:
        """Return what a callback's failure in a hook is charged to."""
        entry = self._entries.get(callback)
        return Blame(callback, hook, self.warns(callback), entry.kwargs if entry else {})

    def clean_up(
        self, ctx: CallbackCtx, error: BaseException, started: Iterable[str]
    ) -> list[HookError]:
        """Call ``on_init_failed`` of the callbacks that have ``started``; return what failed.

        A callback that has no other hook counts as started.
        """
        others = [order for hook, order in self.run_order().items() if hook != CLEAN_UP]
        idle = set().union(*others) - set(started)
        plugins = [plugin for name, plugin in self.list_name_plugin() if name in idle]
        failures = list(self.subset_hook_caller(CLEAN_UP, plugins)(ctx=ctx, error=error))
        for failure in failures:
            if failure.__cause__ is error:  # raised again; it will hold the failure, not both ways
                failure.__cause__ = None
        return failures

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a rayserve_hooks PluginManager cannot be pickled: callbacks are built once in each "
            "process; send the config and call rayserve_hooks.get_plugin_manager(config) there"
        )


_managers: dict[object, PluginManager] = {}
_managers_lock = threading.RLock()  # a callback's constructor may ask for its own manager


def manager_of(stack: CallbackStack) -> PluginManager:
    """Return this process's plugin manager of a stack; the first call builds it.

    Ray reuses worker processes across deployments, so the manager is kept by deployment and
    callback list, never by process alone. Threads that ask at the same moment get the same one.
    """
    with _managers_lock:
        if stack.key not in _managers:
            _managers[stack.key] = PluginManager(stack)
        return _managers[stack.key]
