"""The plugin manager: registration, order, one per process and deployment."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import pluggy

from rayserve_hooks.cluster import _ray
from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core import _pluggy
from rayserve_hooks.core import threads as aio
from rayserve_hooks.core.limits import TimeLimits
from rayserve_hooks.core.loading import CallbackEntry, is_protocol_stub, parse_callbacks
from rayserve_hooks.core.masking import redact
from rayserve_hooks.errors import CallbackConfigError, HookError, Problems, RemoteCause, describe
from rayserve_hooks.hookspecs import (
    CLEAN_UP,
    FIRST_RESULT,
    HOOKS,
    PHASES,
    PROJECT,
    RayServeLLMCallback,
)
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
        time_limits: How long the steps of an initialization may take.
    """

    deployment: str
    entries: tuple[CallbackEntry, ...]
    on_error: str = "raise"
    time_limits: TimeLimits = dataclasses.field(default_factory=TimeLimits)

    @property
    def key(self) -> tuple[object, ...]:
        entries = (entry.key for entry in self.entries)
        return (self.deployment, self.on_error, self.time_limits, *entries)


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
        self._kwargs = {entry.name: entry.kwargs for entry in stack.entries}
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
            # Cleaning up goes the other way.
            groups = ("tryfirst", "") if hook == CLEAN_UP else ("trylast",)
            _pluggy.reverse_groups(getattr(self.hook, hook), *groups)

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

    def warns(self, callback: str) -> bool:
        """Tell whether a callback's failure is only logged."""
        return callback in self._warns

    def kwargs_of(self, callback: str) -> Mapping[str, Any]:
        """Give a callback's constructor arguments; their secrets stay out of errors."""
        return self._kwargs.get(callback, {})

    def clean_up(
        self, ctx: CallbackCtx, error: BaseException, started: Iterable[str]
    ) -> list[HookError]:
        """Call ``on_init_failed`` of the callbacks that had started in this process.

        Args:
            ctx: The context.
            error: What ended the initialization.
            started: Names of the callbacks of which a hook was called. One that has no other
                hook counts as started.

        Returns:
            What failed in it.
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

    def _instrument(self, impl: pluggy.HookImpl, hook: str) -> None:
        wrap = _wrapper_call if impl.wrapper else _call
        call = _Call(
            impl.function,
            impl.plugin_name,
            hook,
            impl.argnames.index("ctx"),
            self.warns(impl.plugin_name),
            self.kwargs_of(impl.plugin_name),
        )
        _pluggy.replace_function(impl, wrap(call))


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


@dataclass(frozen=True)
class _Call:
    """What is known of an impl's calls.

    Args:
        function: The callback's own.
        callback: The callback's name.
        hook: The hook's name.
        ctx_index: Which of its arguments is the context.
        warns: Whether a failure is only logged.
        kwargs: The callback's constructor arguments; their secrets are kept out of errors.
    """

    function: Callable[..., Any]
    callback: str
    hook: str
    ctx_index: int
    warns: bool
    kwargs: Mapping[str, Any]


def _call(this: _Call) -> Callable[..., Any]:
    """Make the function pluggy calls in place of a callback's own."""
    function, callback, hook, ctx_index = this.function, this.callback, this.hook, this.ctx_index

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        aio.check_given_up()
        ctx: CallbackCtx = args[ctx_index]
        entry, outer = ctx._begin(callback, hook)
        outcome = "interrupted"  # stands when what is raised is no Exception
        try:
            returned = function(*args)
            result = None if returned is None else _checked(returned, hook)
            if result is None:
                outcome = "returned"
            else:
                outcome = "handled"
                entry.reason = redact(result.reason, ctx._values)
            return result
        except Exception as error:
            outcome = "warned" if this.warns else "failed"
            return _fail(error, ctx, this)
        finally:
            ctx._end(entry, outer, outcome)

    return call


def _wrapper_call(this: _Call) -> Callable[..., Generator[None, Any, Any]]:
    """Make the generator function pluggy calls in place of a wrapper's own."""

    @functools.wraps(this.function)
    def call(*args: Any) -> Generator[None, Any, Any]:
        aio.check_given_up()
        ctx: CallbackCtx = args[this.ctx_index]
        entry, outer = ctx._begin(this.callback, this.hook)
        outcome = "interrupted"
        inner: Any = None
        inner_error: BaseException | None = None
        yielded = False
        try:
            try:
                generator = this.function(*args)
                _start(generator)
                ctx._note_changes(entry)  # what follows is the inner callbacks' doing
                yielded = True
                try:
                    inner = yield
                except BaseException as error:  # the wrapper decides what becomes of it
                    inner_error = error
                result = _resume(generator, inner, inner_error)
                if this.hook in FIRST_RESULT and result is not None:
                    result = _checked(result, this.hook)
                outcome = "returned"
                # Of a clean-up, what failed inside is the result, whatever a wrapper returns.
                return (inner or []) if this.hook == CLEAN_UP else result
            except Exception as error:
                if error is inner_error:
                    outcome = "returned"
                    raise
                outcome = "warned" if this.warns else "failed"
                failure = _fail(error, ctx, this)
            # A failure that is not raised: go on as if the wrapper were not there.
            if not yielded:
                inner = yield
            if inner_error is not None:
                raise inner_error
            return inner if failure is None else [*inner, failure]
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
        result = aio.run_coroutine(result)
    if result is None or (isinstance(result, Handled) and hook in FIRST_RESULT):
        return result
    if hook not in FIRST_RESULT:
        raise TypeError(f"returned {_shown(result)}; {hook} has no result, return None")
    if hook == "on_before_download" and isinstance(result, str | os.PathLike):
        return Handled(model_path=result)
    raise TypeError(
        f"returned {_shown(result)}; return Handled(...) to say 'done, skip the rest', or None "
        "to go on with the next callback"
    )


def _shown(result: object) -> str:
    return repr(result) if isinstance(result, bool) else f"a {type(result).__name__}"


def _fail(error: Exception, ctx: CallbackCtx, this: _Call) -> HookError | None:
    """Raise the error as a `HookError`, or log it where the config says ``on_error: warn``.

    Returns:
        None, so that the next callback runs; or, of a clean-up, the error: it is logged, and a
        list of such results is what the hook call gives.
    """
    cleaning_up = this.hook == CLEAN_UP
    if isinstance(error, HookError) and not this.warns and not cleaning_up:
        raise error  # of a hook called by this callback; it names who failed already
    failure = hook_error(error, ctx, this.callback, this.hook, kwargs=this.kwargs)
    if this.warns:
        log_warned(failure)
        return None
    if cleaning_up:
        logger.error("%s", failure, exc_info=failure.__cause__)
        return failure
    raise failure from failure.__cause__


def log_warned(failure: HookError) -> None:
    """Log a failure with its traceback where the config says ``on_error: warn``."""
    logger.warning("%s (on_error: warn, going on)", failure, exc_info=failure.__cause__)


def hook_error(
    error: BaseException,
    ctx: CallbackCtx,
    callback: str,
    hook: str,
    *,
    what: str = "",
    kwargs: Mapping[str, Any] | None = None,
) -> HookError:
    """Make the `HookError` of what a callback raised, which becomes its cause.

    Args:
        error: What was raised.
        ctx: The context; its secrets are kept out of the text and the cause.
        callback: The callback's name.
        hook: The hook's name.
        what: What of the callback, when it is not the hook's own call.
        kwargs: The callback's constructor arguments; their secrets are kept out, too.
    """
    values = {"ctx": ctx._values, "kwargs": kwargs or {}}
    failure = HookError(
        callback=callback,
        hook=hook,
        node=str(ctx.node),
        phase=PHASES[hook],
        detail=what + redact(describe(error), values),
        advice="fix the callback, or set 'on_error: warn' on it to go on without it",
    )
    failure.__cause__ = _without_secrets(error, values)
    return failure


def _without_secrets(error: BaseException, values: Mapping[str, Any]) -> BaseException:
    """Give the error, or a stand-in if its text, or that of one it came from, shows a secret."""
    texts = "".join(traceback.format_exception(error, limit=0))
    if redact(texts, values) == texts:
        return error
    formatted = redact("".join(traceback.format_exception(error)), values)
    stand_in = RemoteCause(redact(describe(error), values))
    stand_in.add_note(f"traceback, without secrets:\n{formatted}")
    return stand_in


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
    stack = parse_stack(
        _ray.deployment_name(config.model_id),
        settings.callback_class,
        settings.callback_kwargs,
        on_error="raise" if settings.raise_error_on_callback else "warn",
    )
    if _ray.runs_hooks(settings.callback_class):
        # Kept in the config: later calls, and the processes it is sent to, see the same entries.
        settings.callback_kwargs["callbacks"] = list(stack.entries)
    return dataclasses.replace(stack, entries=enabled(stack.entries))


def parse_stack(
    deployment: str, callback_class: str | type, kwargs: Mapping[str, Any], on_error: str = "raise"
) -> CallbackStack:
    """Read a ``callback_config``.

    Args:
        deployment: The deployment's name.
        callback_class: What the config names: `HooksCallback`, or a callback of Ray's own kind,
            which is then a list of one.
        kwargs: Its ``callback_kwargs``.
        on_error: What an entry that does not say does when it fails.

    Raises:
        CallbackConfigError: The list or a limit is malformed.
    """
    if not _ray.runs_hooks(callback_class):
        return CallbackStack(deployment, (CallbackEntry(callback_class, kwargs),), on_error)
    problems = Problems()
    for unknown in sorted(set(kwargs) - {"callbacks", "time_limits"}):
        with problems.collected():
            raise CallbackConfigError(
                f"callback_kwargs has unknown key {unknown!r}; HooksCallback takes 'callbacks', a "
                "list, and 'time_limits', a mapping"
            )
    stack = CallbackStack(deployment, (), on_error)
    with problems.collected():
        entries = parse_callbacks(kwargs.get("callbacks", ()), "callbacks")
        stack = dataclasses.replace(stack, entries=entries)
    with problems.collected():
        limits = TimeLimits.parse(kwargs.get("time_limits", {}))
        stack = dataclasses.replace(stack, time_limits=limits)
    problems.raise_all()
    return stack


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
