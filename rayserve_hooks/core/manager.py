"""The plugin manager: registration, order, one per process and deployment."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from types import ModuleType
from typing import Any, NoReturn

import pluggy

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core import _pluggy
from rayserve_hooks.core.calls import plain_call, wrapper_call
from rayserve_hooks.core.failures import Blame, OwnFailures
from rayserve_hooks.core.hooks import CLEAN_UP, HOOKS, PHASES, REVERSED
from rayserve_hooks.core.inspection import (
    HookFunction,
    hook_functions,
    hook_options,
    is_a,
    signature_problems,
)
from rayserve_hooks.core.masking import publish
from rayserve_hooks.core.stack import CallbackEntry, CallbackStack
from rayserve_hooks.errors import CallbackConfigError, HookError
from rayserve_hooks.hookspecs import PROJECT, RayServeLLMCallback

publish(*HOOKS, *PHASES.values())


class RegisteredCallback:
    """What pluggy holds for a callback: equal to that one object, whatever its ``==`` says.

    pluggy compares plugins with ``==`` and would take two equal instances, such as those of a
    dataclass, for one; and it offers no interception of single calls, which recording and blame
    need. It is the ``plugin`` of every ``HookImpl``, and its ``callback`` is the callback itself,
    which is what all methods of `PluginManager` take and return.
    """

    def __init__(self, callback: object, name: str, hooks: Mapping[HookFunction, Any]) -> None:
        self.callback = callback
        self.name = name
        self._hooks = {_attribute(hook): hook for hook in hooks}
        vars(self).update({_attribute(hook): function for hook, function in hooks.items()})

    def options_of(self, attribute: str) -> pluggy.HookimplOpts | None:
        """Return what ``@hookimpl`` says of a hook, or None for another attribute."""
        hook = self._hooks.get(attribute)
        return None if hook is None else {**hook.options, "specname": hook.hook}

    def original(self, function: object) -> Callable[..., Any] | None:
        """Return the callback's own function, of what pluggy calls."""
        for attribute, hook in self._hooks.items():
            if vars(self)[attribute] is function:
                return hook.function
        return None

    def __getattr__(self, name: str) -> None:
        # pluggy 1.6 asks by the hook's name whether a plugin has the hook.
        if name.startswith("_") or all(hook.hook != name for hook in self._hooks.values()):
            raise AttributeError(f"{self!r} has no {name!r}; see the callback: its 'callback'")

    def __eq__(self, other: object) -> bool:
        return other is self or other is self.callback

    def __hash__(self) -> int:
        return object.__hash__(self.callback)

    def __repr__(self) -> str:
        # Not the callback's own, which may show anything.
        cls = type(self.callback)
        return f"<callback {self.name!r} of {cls.__module__}.{cls.__qualname__}>"


def _attribute(hook: HookFunction) -> str:
    """Return under which name a registration has a hook: one that it has no attribute of."""
    return f"{hook.attribute}()"


class Callbacks(AbstractSet[Any]):
    """A set that tells objects apart by identity: a dataclass has no hash, and may be equal."""

    def __init__(self, callbacks: Iterable[Any]) -> None:
        self._by_id = {id(callback): callback for callback in callbacks}

    def __contains__(self, callback: object) -> bool:
        return id(callback) in self._by_id

    def __iter__(self) -> Iterator[Any]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def __repr__(self) -> str:
        return f"<{len(self)} callbacks>"  # not theirs, which may show anything


class PluginManager(pluggy.PluginManager):
    """A `pluggy.PluginManager` whose hooks run in list order, are traced and name who failed.

    It builds and registers the callbacks of a stack; an error names all that cannot be. Without
    ``construct`` no class is called, and an `Unbuilt` stands for each, only to be looked at. Its
    methods take and return callbacks, and tell them apart by identity.
    """

    def __init__(self, stack: CallbackStack, construct: bool = True) -> None:
        super().__init__(PROJECT)
        self.stack = stack
        self.add_hookspecs(RayServeLLMCallback)
        self._entries = {entry.name: entry for entry in stack.entries}
        # Built in list order, registered from the last: pluggy runs the last registered first.
        for entry, plugin in reversed(stack.build(construct)):
            self.register(plugin, entry.name)
        for hook in HOOKS:
            # Cleaning up and shutting down go the other way.
            groups = ("tryfirst", "") if hook in REVERSED else ("trylast",)
            _pluggy.reverse_groups(getattr(self.hook, hook), *groups)

    def register(self, plugin: Any, name: str | None = None) -> str | None:
        """Register a callback; a method named after a hook is that hook, decorated or not.

        A hook that could not be called, and an object that is registered already, are a
        `CallbackConfigError`, a taken name a ValueError. After an error nothing is registered.
        """
        plugin = _callback(plugin)
        if plugin is None:  # ignored, as in pluggy
            return None
        name = name or self.get_canonical_name(plugin)
        publish(name)
        already = self.get_name(plugin)
        if already is not None:
            raise CallbackConfigError(
                f"callbacks {already!r} and {name!r} are the same object; name the class twice, "
                "or make two instances"
            )
        hooks = list(hook_functions(plugin, self.parse_hookimpl_opts))
        problems = signature_problems(plugin, {hook.attribute: hook for hook in hooks})
        if problems and is_a(plugin, type):  # whose hooks have nobody to be called on
            problems = [f"is the class itself; register {plugin.__name__}(), an instance of it"]
        if problems:
            raise CallbackConfigError(*(f"callback {name!r}: {problem}" for problem in problems))
        if is_a(plugin, OwnFailures):
            plugin.blame_of = functools.partial(self.blame, name)
        registered = RegisteredCallback(
            plugin, name, {hook: self._instrumented(hook, name, plugin) for hook in hooks}
        )
        with _blames_callback():
            try:
                return super().register(registered, name)
            except BaseException:  # pluggy 1.6 checks while it registers
                if super().get_plugin(name) is registered:
                    super().unregister(registered, name)
                raise

    def add_hookspecs(self, module_or_class: Any) -> None:
        with _blames_callback():
            super().add_hookspecs(module_or_class)

    def check_pending(self) -> None:
        with _blames_callback():
            super().check_pending()

    def _instrumented(self, hook: HookFunction, name: str, plugin: object) -> Callable[..., Any]:
        if hook.hook not in HOOKS:
            return hook.function
        blame = self.blame(name, hook.hook, plugin)
        if hook.options["wrapper"]:
            return wrapper_call(hook.function, blame)
        return plain_call(hook.function, blame, functools.partial(self._later, name, hook.hook))

    def _later(self, name: str, hook: str) -> list[str]:
        """Return the callbacks that run after one that is no wrapper."""
        order = self.run_order()[hook]
        return order[len(order) - order[::-1].index(name) :]  # the last: it may be a wrapper, too

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> pluggy.HookimplOpts | None:
        if is_a(plugin, RegisteredCallback):
            return plugin.options_of(name)
        return hook_options(plugin, name, self.project_name)

    def load_setuptools_entrypoints(self, group: str, name: str | None = None) -> int:
        """Register what is installed under an entry-point group; a class is built first."""
        count = 0
        for distribution in importlib.metadata.distributions():
            for entry_point in distribution.entry_points:
                found = entry_point.name
                if entry_point.group != group or found != (name or found):
                    continue
                if self.has_plugin(found) or self.is_blocked(found):
                    continue
                plugin = entry_point.load()
                if is_a(plugin, type):
                    plugin = CallbackEntry(plugin, name=found).create(self.stack.adapt)
                self.register(plugin, found)
                _pluggy.note_distribution(self, plugin, distribution)
                count += 1
        return count

    def registered(self, plugin: Any) -> RegisteredCallback | None:
        """Return the `RegisteredCallback` of a callback or of itself; None if there is none."""
        for _, found in super().list_name_plugin():
            if not isinstance(found, RegisteredCallback):
                continue  # a blocked name
            if found is plugin or found.callback is plugin:
                return found
        return None

    # pluggy compares with ``==``, which would run what is not registered; so only ours go there.

    def get_canonical_name(self, plugin: Any) -> str:
        named = is_a(plugin, (type, ModuleType))
        name = plugin.__name__ if named else inspect.getattr_static(plugin, "__name__", None)
        return name if isinstance(name, str) else str(id(plugin))

    def get_name(self, plugin: Any) -> str | None:
        found = self.registered(plugin)
        return None if found is None else super().get_name(found)

    def is_registered(self, plugin: Any) -> bool:
        return self.registered(plugin) is not None

    def get_plugin(self, name: str) -> Any | None:
        return _callback(super().get_plugin(name))

    def get_plugins(self) -> Callbacks:  # type: ignore[override] # a set needs hashes
        return Callbacks(found.callback for found in super().get_plugins())

    def list_name_plugin(self) -> list[tuple[str, Any]]:
        return [(name, _callback(found)) for name, found in super().list_name_plugin()]

    def unregister(self, plugin: Any = None, name: str | None = None) -> Any | None:
        found = super().get_plugin(name) if plugin is None and name else self.registered(plugin)
        if found is None and plugin is None and name:
            return None
        return _callback(super().unregister(found or plugin, name))

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

    def blame(self, callback: str, hook: str, plugin: object = None) -> Blame:
        """Return what a callback's failure in a hook is charged to."""
        entry = self._entries.get(callback)
        kwargs = entry.kwargs if entry else {}
        plugin = self.get_plugin(callback) if plugin is None else plugin
        return Blame(callback, hook, self.warns(callback), kwargs, plugin, entry is not None)

    def clean_up(
        self, ctx: CallbackCtx, error: BaseException, started: Iterable[str]
    ) -> list[HookError]:
        """Call ``on_init_failed`` of the callbacks that have ``started``; return what failed.

        A callback that has no other hook counts as started.
        """
        others = [order for hook, order in self.run_order().items() if hook not in REVERSED]
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


def _callback(found: Any) -> Any:
    return found.callback if is_a(found, RegisteredCallback) else found


@contextlib.contextmanager
def _blames_callback() -> Iterator[None]:
    try:
        yield
    except pluggy.PluginValidationError as error:
        error.plugin = _callback(error.plugin)
        raise


_managers: weakref.WeakValueDictionary[object, PluginManager] = weakref.WeakValueDictionary()
_builders: dict[object, int] = {}  # by key, the thread that builds its manager
_waiting: dict[int, object] = {}  # by thread, the key whose manager it waits for
_built = threading.Condition()


def manager_of(stack: CallbackStack) -> PluginManager:
    """Return this process's plugin manager of a stack; the first call builds it.

    Ray reuses worker processes across deployments, so the manager is kept by deployment and
    callback list, never by process alone, and for as long as one of its configs lives. Threads
    that ask at the same moment get the same one; those that ask for others do not wait.
    """
    key, thread = stack.key, threading.get_ident()
    with _built:
        while key in _builders:
            _refuse_circle(key, thread)
            _waiting[thread] = key
            _built.wait()
            del _waiting[thread]
        manager = _managers.get(key)
        if manager is None:
            _builders[key] = thread
    if manager is None:
        try:
            manager = PluginManager(stack)
        finally:
            with _built:
                if manager is not None:
                    _managers[key] = manager
                del _builders[key]
                _built.notify_all()
    stack.kept.managers[key] = manager
    return manager


def _refuse_circle(key: object, thread: int) -> None:
    """Raise where a constructor asks for what waits for it, which would hang for ever."""
    awaited: object | None = key
    while awaited in _builders:
        builder = _builders[awaited]
        if builder == thread:
            raise RuntimeError(
                "it asks for a plugin manager that is built only after it; ask in a hook"
            )
        awaited = _waiting.get(builder)
