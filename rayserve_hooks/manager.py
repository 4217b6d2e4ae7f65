"""The plugin manager: registration, order, one per process and deployment."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import pluggy

from rayserve_hooks import _pluggy, _ray, aio
from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.errors import CallbackConfigError, HookError, Problems, describe
from rayserve_hooks.hookspecs import HOOKS, PHASES, PROJECT, RayServeLLMCallback
from rayserve_hooks.loading import CallbackEntry, is_protocol_stub, parse_callbacks
from rayserve_hooks.trace import LOGGER_NAME

logger = logging.getLogger(LOGGER_NAME)


DISABLE_VARIABLE = "RAYSERVE_HOOKS_DISABLE"
"""Environment variable: names of callbacks to leave out, separated by commas."""

# What ``@hookimpl`` without arguments gives a method.
_UNDECORATED = pluggy.HookimplOpts(
    wrapper=False,
    hookwrapper=False,
    optionalhook=False,
    tryfirst=False,
    trylast=False,
    specname=None,
)


@dataclass(frozen=True)
class CallbackStack:
    """A deployment's callback list: what travels to other processes, where managers are built.

    Args:
        deployment: Name of the deployment, so that two with the same list share nothing.
        entries: The callbacks, in list order.
        on_error: What an entry that does not say does when it fails.
    """

    deployment: str
    entries: tuple[CallbackEntry, ...]
    on_error: str = "raise"

    @property
    def key(self) -> tuple[object, ...]:
        return (self.deployment, self.on_error, *(entry.key for entry in self.entries))


class PluginManager(pluggy.PluginManager):
    """A `pluggy.PluginManager` whose hooks run in list order, are traced and name who failed.

    Args:
        stack: The callbacks to build and register.

    Raises:
        CallbackConfigError: A callback cannot be imported or built, or is none.
    """

    def __init__(self, stack: CallbackStack) -> None:
        super().__init__(PROJECT)
        self.stack = stack
        self._stand_ins: dict[int, Any] = {}  # by id of the plugin, which the stand-in keeps alive
        self.add_hookspecs(RayServeLLMCallback)
        self._warns = {
            entry.name for entry in stack.entries if (entry.on_error or stack.on_error) == "warn"
        }
        # Built in list order, registered from the last: pluggy runs the last registered first.
        problems = Problems()
        plugins: list[tuple[str, object]] = []
        for entry in stack.entries:
            with problems.collected():
                plugins.append((entry.name, entry.create()))
        problems.raise_all()
        for name, plugin in reversed(plugins):
            self.register(plugin, name)
        for hook in HOOKS:
            _pluggy.reverse_trylast(getattr(self.hook, hook))

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> pluggy.HookimplOpts | None:
        """Take a method named after a hook as that hook, decorated or not."""
        if is_protocol_stub(plugin, name):
            return None
        opts = super().parse_hookimpl_opts(plugin, name)
        if opts is None and name in HOOKS and inspect.isroutine(getattr(plugin, name)):
            return _UNDECORATED
        return opts

    def register(self, plugin: Any, name: str | None = None) -> str | None:
        already = self.get_name(plugin)
        if already is not None:
            raise CallbackConfigError(
                f"callbacks {already!r} and {name!r} are the same object; name the class twice, "
                "or make two instances"
            )
        registered = self._stand_ins[id(plugin)] = _stand_in(plugin)
        plugin_name = super().register(registered, name)
        if plugin_name is not None:
            for caller in super().get_hookcallers(registered) or ():
                if caller.name in HOOKS:
                    for impl in caller.get_hookimpls():
                        if impl.plugin is registered:
                            self._instrument(impl, caller.name)
        return plugin_name

    # pluggy compares plugins with ==, and would take two equal instances, such as those of a
    # dataclass, for one. It gets to see a stand-in of such a plugin; callers never do.

    def unregister(self, plugin: Any = None, name: str | None = None) -> Any | None:
        return _seen_through(super().unregister(self._registered(plugin), name))

    def get_name(self, plugin: Any) -> str | None:
        return super().get_name(self._registered(plugin))

    def get_plugin(self, name: str) -> Any | None:
        return _seen_through(super().get_plugin(name))

    def list_name_plugin(self) -> list[tuple[str, Any]]:
        return [(name, _seen_through(plugin)) for name, plugin in super().list_name_plugin()]

    def is_registered(self, plugin: Any) -> bool:
        return self.get_name(plugin) is not None

    def get_hookcallers(self, plugin: Any) -> list[pluggy.HookCaller] | None:
        return super().get_hookcallers(self._registered(plugin))

    def subset_hook_caller(self, name: str, remove_plugins: Iterable[Any]) -> pluggy.HookCaller:
        return super().subset_hook_caller(name, [self._registered(p) for p in remove_plugins])

    def _registered(self, plugin: Any) -> Any:
        return self._stand_ins.get(id(plugin), plugin)

    def run_order(self) -> dict[str, list[str]]:
        """Name each hook's callbacks in the order in which they run, wrappers outermost first."""
        return {
            hook: [impl.plugin_name for impl in reversed(getattr(self.hook, hook).get_hookimpls())]
            for hook in HOOKS
        }

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a rayserve_hooks PluginManager cannot be pickled: callbacks are built once in each "
            "process; send the config and call rayserve_hooks.get_plugin_manager(config) there"
        )

    def _instrument(self, impl: pluggy.HookImpl, hook: str) -> None:
        wrap = _wrapper_call if impl.wrapper else _call
        warns = impl.plugin_name in self._warns
        _pluggy.replace_function(impl, wrap(impl.function, impl.plugin_name, hook, warns))


class _StandIn:
    """Has a plugin's hooks, and is equal to itself only."""

    def __init__(self, plugin: object) -> None:
        self.stands_for = plugin
        for name in dir(plugin):
            # Looked up statically, so that no property of the plugin runs.
            if not name.startswith("_") and inspect.isroutine(inspect.getattr_static(plugin, name)):
                setattr(self, name, getattr(plugin, name))


def _stand_in(plugin: Any) -> Any:
    compares_by_identity = getattr(type(plugin), "__eq__", None) is getattr(object, "__eq__", None)
    return plugin if compares_by_identity else _StandIn(plugin)


def _seen_through(plugin: Any) -> Any:
    return plugin.stands_for if isinstance(plugin, _StandIn) else plugin


def _call(
    function: Callable[..., Any], callback: str, hook: str, warns: bool
) -> Callable[[CallbackCtx], Handled | None]:
    """Make the function pluggy calls in place of a callback's own."""

    @functools.wraps(function)
    def call(ctx: CallbackCtx) -> Handled | None:
        entry, outer = ctx._begin(callback, hook)
        outcome = "interrupted"  # stands when what is raised is no Exception
        try:
            returned = function(ctx)
            result = None if returned is None else _checked(returned, hook)
            outcome = "returned" if result is None else "handled"
            return result
        except Exception as error:
            outcome = "warned" if warns else "failed"
            _fail(error, ctx, callback, hook, warns)
            return None
        finally:
            ctx._end(entry, outer, outcome)

    return call


def _wrapper_call(
    function: Callable[..., Any], callback: str, hook: str, warns: bool
) -> Callable[[CallbackCtx], Generator[None, Any, Any]]:
    """Make the generator function pluggy calls in place of a wrapper's own."""

    @functools.wraps(function)
    def call(ctx: CallbackCtx) -> Generator[None, Any, Any]:
        entry, outer = ctx._begin(callback, hook)
        outcome = "interrupted"
        inner: Any = None
        inner_error: BaseException | None = None
        yielded = False
        try:
            try:
                generator = function(ctx)
                _start(generator)
                ctx._note_changes(entry)  # what follows is the inner callbacks' doing
                yielded = True
                try:
                    inner = yield
                except BaseException as error:  # the wrapper decides what becomes of it
                    inner_error = error
                result = _resume(generator, inner, inner_error)
                if hook != "on_after_init" and result is not None:
                    result = _checked(result, hook)
                outcome = "returned"
                return result
            except Exception as error:
                if error is inner_error:
                    outcome = "returned"
                    raise
                outcome = "warned" if warns else "failed"
                _fail(error, ctx, callback, hook, warns)
            # A failure with on_error: warn: go on as if the wrapper were not there.
            if not yielded:
                return (yield)
            if inner_error is not None:
                raise inner_error
            return inner
        finally:
            ctx._end(entry, outer, outcome)

    return call


def _start(generator: Generator[None, Any, Any]) -> None:
    try:
        next(generator)
    except StopIteration:
        raise RuntimeError("a wrapper must yield once") from None


def _resume(
    generator: Generator[None, Any, Any], inner: object, inner_error: BaseException | None
) -> object:
    try:
        if inner_error is None:
            generator.send(inner)
        else:
            generator.throw(inner_error)
    except StopIteration as stop:
        return stop.value
    generator.close()
    raise RuntimeError("a wrapper must yield once")


def _checked(result: object, hook: str) -> Handled | None:
    """Await a coroutine; turn what a hook may return into a `Handled` or None."""
    if inspect.isawaitable(result):
        result = aio.run_coroutine(_awaited(result))
    if result is None or (isinstance(result, Handled) and hook != "on_after_init"):
        return result
    if hook == "on_after_init":
        raise TypeError(f"returned {_shown(result)}; {hook} has no result, return None")
    if hook == "on_before_download" and isinstance(result, str | os.PathLike):
        return Handled(model_path=result)
    raise TypeError(
        f"returned {_shown(result)}; return Handled(...) to say 'done, skip the rest', or None "
        "to go on with the next callback"
    )


async def _awaited(awaitable: Awaitable[object]) -> object:
    return await awaitable


def _shown(result: object) -> str:
    return repr(result) if isinstance(result, bool) else f"a {type(result).__name__}"


def _fail(error: Exception, ctx: CallbackCtx, callback: str, hook: str, warns: bool) -> None:
    """Raise the error as a `HookError`, or log it where the config says ``on_error: warn``."""
    if isinstance(error, HookError) and not warns:
        raise error  # of a hook called by this callback; it names who failed already
    failure = HookError(
        callback=callback,
        hook=hook,
        node=str(ctx.node),
        phase=PHASES[hook],
        detail=describe(error),
    )
    if not warns:
        raise failure from error
    logger.warning("%s (on_error: warn, going on)", failure, exc_info=error)


_managers: dict[object, PluginManager] = {}
_managers_lock = threading.RLock()  # a callback's constructor may ask for its own manager


def get_plugin_manager(config: Any) -> PluginManager:
    """Get this process's plugin manager of a deployment; the first call builds it.

    Ray reuses worker processes across deployments, so the manager is kept by deployment and
    callback list, never by process alone. Threads that ask at the same moment get the same one.

    Args:
        config: An ``LLMConfig`` of this package or, configured with ``HooksCallback``, of Ray.

    Returns:
        The manager; ``get_plugin_manager(config).hook.on_before_init(ctx=ctx)`` calls a hook.

    Raises:
        CallbackConfigError: A callback cannot be imported or built, or is none.
    """
    stack = config if isinstance(config, CallbackStack) else stack_of(config)
    with _managers_lock:
        if stack.key not in _managers:
            _managers[stack.key] = PluginManager(stack)
        return _managers[stack.key]


def stack_of(config: Any) -> CallbackStack:
    """Read the callback list of an ``LLMConfig``, ours or Ray's.

    A callback of Ray's own kind that the config names instead of ``HooksCallback`` is a list of
    one.

    Raises:
        CallbackConfigError: The list is malformed.
    """
    settings = config.callback_config
    if _ray.runs_hooks(settings):
        entries = _listed(settings.callback_kwargs)
    else:
        entries = (CallbackEntry(settings.callback_class, settings.callback_kwargs),)
    return CallbackStack(
        deployment=_ray.deployment_name(config.model_id),
        entries=enabled(entries),
        on_error="raise" if settings.raise_error_on_callback else "warn",
    )


def _listed(kwargs: dict[str, Any]) -> tuple[CallbackEntry, ...]:
    unknown = sorted(set(kwargs) - {"callbacks"})
    if unknown:
        raise CallbackConfigError(
            f"callback_kwargs has unknown key {unknown[0]!r}; HooksCallback takes 'callbacks', a "
            "list"
        )
    entries = parse_callbacks(kwargs.get("callbacks", ()), "callbacks")
    # Kept in the config: later calls, and the processes it is sent to, see the same entries.
    kwargs["callbacks"] = list(entries)
    return entries


def enabled(entries: tuple[CallbackEntry, ...]) -> tuple[CallbackEntry, ...]:
    """Leave out what the environment variable `DISABLE_VARIABLE` switches off.

    It is read where the list is read from the config, in the replica; what travels to the other
    nodes is the shortened list, so that all processes agree.
    """
    named = {name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(",")} - {""}
    unknown = sorted(named - {entry.name for entry in entries})
    if unknown:
        known = ", ".join(sorted(entry.name for entry in entries)) or "none"
        raise CallbackConfigError(
            f"{DISABLE_VARIABLE} names {unknown[0]!r}, which is no callback of this deployment; "
            f"use names of its callbacks (known: {known})"
        )
    for name in sorted(named):
        logger.warning("callback %r is switched off by %s", name, DISABLE_VARIABLE)
    return tuple(entry for entry in entries if entry.name not in named)
