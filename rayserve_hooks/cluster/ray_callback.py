"""Run a callback written for Ray's own slot next to ours, unchanged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from inspect import Parameter, getattr_static, isabstract, signature
from typing import Any
from weakref import WeakKeyDictionary

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster.placement import make_default_group
from rayserve_hooks.cluster.ray_instance import DOWNLOAD, RayInstance, has, is_run_as_usual
from rayserve_hooks.cluster.travel import pack_custom_data
from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core.failures import Blame, OwnFailures, hook_error, settle
from rayserve_hooks.core.inspection import Unbuilt, is_a, names_of
from rayserve_hooks.core.loading import argument_problems, raise_problems
from rayserve_hooks.core.manager import PluginManager
from rayserve_hooks.core.recorder import recorder_of
from rayserve_hooks.errors import CallbackConfigError, HookError, HooksError, did_you_mean


def adapt_ray_callback(found: object, kwargs: Mapping[str, Any]) -> RayCallback | None:
    """Return a plugin for a class that is written for Ray's own slot; None for anything else."""
    cls = found if is_a(found, type) else type(found)
    if not _ray.is_ray_callback(cls):
        return None
    if not is_a(found, type):
        raise CallbackConfigError(
            "is an instance of a Ray callback, which belongs to one config and context; name the "
            "class, with its arguments in kwargs"
        )
    if _ray.is_hooks_callback(cls):
        raise CallbackConfigError(
            "HooksCallback runs this list and cannot be in it; list the callbacks themselves"
        )
    return RayCallback(cls, kwargs)


_METHODS = {
    "on_before_init": "on_before_node_init",
    "on_before_download": DOWNLOAD,
    "on_after_init": "on_after_node_init",
}
_GIVEN_BY_RAY = ("llm_config", "raise_error_on_callback", "ctx_kwargs")


def _problems(cls: type, kwargs: Mapping[str, Any]) -> Iterator[str]:
    """Yield what would keep a class of Ray's kind from being built, or from doing anything."""
    yield from _misspelt(cls)
    if _ray.does_nothing(cls):
        close = (did_you_mean(name, _METHODS.values()) for name in names_of(Unbuilt(cls)))
        hint = next(filter(None, close), "")
        yield f"{cls.__name__} has none of {', '.join(_METHODS.values())}; define one of them{hint}"
    if isabstract(cls):
        missing = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
        yield f"{cls.__name__} is abstract; define {missing}"
    for name in sorted(kwargs.keys() & set(_GIVEN_BY_RAY)):
        use = "set on_error" if name == "raise_error_on_callback" else "drop it"
        yield f"kwargs has {name!r}, which {cls.__name__} is given as Ray gives it; {use}"
    refused = _refused(cls)
    if refused:
        yield (
            f"{cls.__module__}.{cls.__qualname__} takes no {', '.join(map(repr, refused))}, which "
            "Ray gives it; add **kwargs, and hand them to super().__init__()"
        )
    yield from argument_problems(cls, kwargs, given=_GIVEN_BY_RAY)


def _refused(cls: type) -> list[str]:
    """Return which of Ray's arguments a constructor does not take, as far as it says so."""
    try:
        parameters = signature(cls).parameters.values()
    except Exception:  # a class may say it in any way
        return []
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
        return []
    by_keyword = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    taken = {parameter.name for parameter in parameters if parameter.kind in by_keyword}
    return [name for name in _GIVEN_BY_RAY if name not in taken]


def _misspelt(cls: type) -> list[str]:
    """Return which methods are named nearly as one that Ray calls, or as a hook of ours."""
    problems = []
    for name in names_of(Unbuilt(cls)):
        if name in _METHODS.values() or not name.startswith("on_"):
            continue
        close = _METHODS.get(name) or did_you_mean(name, _METHODS.values(), cutoff=0.85)
        if close:
            hint = f"; name it {close!r}" if name in _METHODS else close
            problems.append(f"method {name!r} is none that Ray calls{hint}")
    return problems


class RayCallback(OwnFailures):
    """Calls the three methods of a Ray ``CallbackBase`` where the matching hooks run.

    Each initialization has an instance of its own, built at its first hook, because the
    constructor wants the deployment's config. To other nodes the instance is sent, as by Ray.
    ``run_init_node = False`` means what it means in Ray: this callback has initialized the nodes
    itself. Ray has one download mode for all nodes; setting it sets both of ours.

    What becomes of a failure the instance's ``raise_error_on_callback`` decides, which its
    constructor has got from ``on_error``.
    """

    def __init__(self, cls: type, kwargs: Mapping[str, Any]) -> None:
        self._cls, self._kwargs = cls, dict(kwargs)
        self._instances: WeakKeyDictionary[CallbackCtx, RayInstance] = WeakKeyDictionary()
        # One that ends when it is collected, such as a temporary folder, lives on with the config.
        self._latest: RayInstance | None = None
        self.blame_of = lambda hook: Blame(cls.__name__, hook, kwargs=self._kwargs)
        raise_problems(list(_problems(cls, self._kwargs)))

    def method_of(self, hook: str) -> object:
        """Return the callback's own method that runs where a hook of ours would."""
        return getattr_static(self._cls, _METHODS[hook])

    def on_before_init(self, ctx: CallbackCtx) -> Handled | None:
        make_default_group(ctx)  # which a Ray callback finds in its context from the start
        instance = self._run("on_before_init", ctx)
        if not instance.takes_over:
            return None
        return Handled(reason=f"{self._cls.__name__} set run_init_node to False")

    def on_before_download(self, ctx: CallbackCtx) -> None:
        # An instance that nothing would run of is not sent, so that it need not pickle.
        instance = self._instances.get(ctx)
        if has(self._cls if instance is None else instance.callback, DOWNLOAD):
            self._run("on_before_download", ctx)

    def on_after_init(self, ctx: CallbackCtx) -> None:
        self._run("on_after_init", ctx)

    def _run(self, hook: str, ctx: CallbackCtx) -> RayInstance:
        """Call the method that a hook stands for, and return the callback's instance."""
        blame = self.blame_of(hook)
        with _fatal(ctx, blame, "fix the callback or its kwargs, or leave it out"):
            instance = self._instances.get(ctx) or self._build(ctx)
            instance.exchange(ctx)
        try:
            self._call(instance, hook, ctx)
        finally:  # what it set before it failed counts
            with _fatal(ctx, blame, "fix the callback"):
                instance.exchange(ctx)
        return instance

    def _call(self, instance: RayInstance, hook: str, ctx: CallbackCtx) -> None:
        method, blame = _METHODS[hook], self.blame_of(hook)
        try:
            instance.run(method)
        except Exception as error:
            raises = not is_run_as_usual(instance.callback, method) or instance.raises
            if raises and blame.warns:
                with _fatal(ctx, blame, "fix the callback, which raises whatever on_error says"):
                    raise
            running = recorder_of(ctx).running
            settle(error, ctx, replace(blame, warns=not raises), running)
            if running is not None:
                running.outcome = "warned"

    def _build(self, ctx: CallbackCtx) -> RayInstance:
        raises = not self.blame_of("on_before_init").warns
        return self._keep(RayInstance.build(self._cls, self._kwargs, ctx, raises), ctx)

    def _keep(self, instance: RayInstance, ctx: CallbackCtx) -> RayInstance:
        self._instances[ctx] = self._latest = instance
        return instance

    def packed(self, ctx: CallbackCtx) -> bytes | None:
        """Return what another node needs: the instance, or None if it would not run there."""
        instance = self._instances.get(ctx)
        if instance is None or not has(instance.callback, DOWNLOAD):
            return None
        try:
            return instance.packed(ctx)
        except Exception as error:  # any class can refuse in its own way
            pack_custom_data(ctx)  # names the key if it is that
            failure = self._no_instance(ctx, "sent to", error)
            raise failure from failure.__cause__

    def unpack(self, data: bytes, ctx: CallbackCtx) -> None:
        """Take the instance of the replica's process in that of another node."""
        try:
            self._keep(RayInstance.unpacked(data, ctx), ctx)
        except Exception as error:  # importing its class runs other people's code
            failure = self._no_instance(ctx, "built again on", error)
            raise failure from failure.__cause__

    def _no_instance(self, ctx: CallbackCtx, what: str, error: Exception) -> HookError:
        blame = self.blame_of("on_before_download")
        failure = hook_error(error, ctx, replace(blame, what=f"cannot be {what} another node: "))
        failure.advice = f"open such things in {DOWNLOAD}, or leave them out in __getstate__"
        return failure


@contextlib.contextmanager
def _fatal(ctx: CallbackCtx, blame: Blame, advice: str) -> Iterator[None]:
    """Charge a failure of the block to a callback; it ends the initialization in any case."""
    try:
        yield
    except HookError:
        raise
    except Exception as error:
        failure = hook_error(error, ctx, blame)
        if not isinstance(error, HooksError):  # ours say themselves what to do
            failure.advice = advice
        raise failure from failure.__cause__


def _adapted(manager: PluginManager) -> Iterator[tuple[str, RayCallback]]:
    for name, plugin in manager.list_name_plugin():
        if is_a(plugin, RayCallback):
            yield name, plugin


def packed_instances(manager: PluginManager, ctx: CallbackCtx) -> dict[str, bytes]:
    """Return by name the instances of Ray's callbacks, as other nodes get them."""
    packed = {name: plugin.packed(ctx) for name, plugin in _adapted(manager)}
    return {name: data for name, data in packed.items() if data is not None}


def unpack_instances(manager: PluginManager, ctx: CallbackCtx, packed: Mapping[str, bytes]) -> None:
    """Hand Ray's callbacks of another node's process their instances."""
    for name, plugin in _adapted(manager):
        if name in packed:
            plugin.unpack(packed[name], ctx)
