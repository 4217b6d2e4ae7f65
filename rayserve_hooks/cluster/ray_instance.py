"""One instance of a Ray callback, in one initialization, and its context beside ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster.travel import dumps_beside_config, loads_beside_config
from rayserve_hooks.context import CallbackCtx, NodeModelDownloadable
from rayserve_hooks.core import threads
from rayserve_hooks.core.instances import attribute_refusal
from rayserve_hooks.core.log import logger
from rayserve_hooks.core.recorder import recorder_of, snapshot

DOWNLOAD = "on_before_download_model_files_distributed"

# Ray runs all but the download method on its event loop, where a plain one may start tasks, and
# may block it: so not on the loop that other callbacks' coroutines are on.
_loop = threads.SharedLoop()


class RayInstance:
    """An instance of a Ray callback, and what its context and ours had when they last agreed.

    `exchange` hands on what either side has changed since. What cannot be said in ours, such as
    ``run_init_node`` or ``runtime_env = None``, stays in Ray's.
    """

    def __init__(self, instance: Any, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        self.callback = instance
        self._ours, self._theirs = ours, theirs
        self._known: dict[Any, Any] = {}  # ctx.custom_data as both had it
        self._own: set[Any] = set()  # keys of it that this callback has set

    @classmethod
    def build(
        cls, ray_class: type, kwargs: Mapping[str, Any], ctx: CallbackCtx, raises: bool
    ) -> RayInstance:
        """Call the constructor as Ray does; ``raises`` is its ``raise_error_on_callback``."""
        ours = {name: getattr(ctx, name) for name in _FIELDS}
        theirs = {name: to_ray(ours[name]) for name, (to_ray, _) in _FIELDS.items()}
        instance = ray_class(
            raise_error_on_callback=raises,
            llm_config=ctx.llm_config,
            ctx_kwargs=dict(theirs),
            **snapshot(kwargs),
        )
        return cls(instance, ours, theirs)

    @property
    def takes_over(self) -> bool:
        """Whether it has set ``run_init_node``, of which Ray looks at the truth value, to False."""
        return not self.callback.ctx.run_init_node

    @property
    def raises(self) -> bool:
        """Whether its failure ends the initialization, as it is when the failure happens."""
        return bool(self.callback.raise_error_on_callback)

    def run(self, method: str) -> None:
        """Run a method where and how Ray does."""
        instance = self.callback
        if not is_run_as_usual(instance, method):
            if method == DOWNLOAD:
                instance.run_callback_sync(method)
            else:
                threads.run_coroutine(_awaited(lambda: instance.run_callback(method)), _loop)
        elif method == DOWNLOAD:
            # Not by Ray's runner, whose asyncio.run() nobody could cancel.
            result = getattr(instance, method)()
            if inspect.isawaitable(result):
                threads.run_coroutine(result, _loop)
        else:
            threads.run_coroutine(_called(getattr(instance, method)), _loop)

    def exchange(self, ctx: CallbackCtx) -> None:
        """Hand on what has changed in Ray's context to ours, then the other way."""
        context = self.callback.ctx
        for name, (to_ray, set_ours) in _FIELDS.items():
            value = getattr(context, name)
            if value is not self._theirs[name]:
                set_ours(ctx, value)
                self._ours[name], self._theirs[name] = getattr(ctx, name), value
            value = getattr(ctx, name)
            if value is not self._ours[name]:
                self._ours[name], self._theirs[name] = value, to_ray(value)
                setattr(context, name, self._theirs[name])
        custom_data = getattr(context, "custom_data", None)
        if isinstance(custom_data, MutableMapping):  # anything else is nobody's but the callback's
            self._exchange_custom_data(custom_data, ctx.custom_data)

    def _exchange_custom_data(
        self, theirs: MutableMapping[Any, Any], ours: MutableMapping[Any, Any]
    ) -> None:
        """Exchange keys, so that assigning or clearing ``custom_data`` removes its own alone."""
        known = self._known
        for key, value in list(theirs.items()):
            if not _has(known, key, value):
                ours[key] = known[key] = value
                self._own.add(key)
        for key in [key for key in self._own if key not in theirs]:
            self._own.remove(key)
            ours.pop(key, None)
            known.pop(key, None)
        for key, value in list(ours.items()):
            if not _has(known, key, value):
                theirs[key] = value
        for key in [key for key in known if key not in ours]:
            theirs.pop(key, None)
        self._known = dict(ours)

    # Ray pickles the instance along with the config. Ours travels by itself, so that a config is
    # loaded once, and is named where it is met.

    def packed(self, ctx: CallbackCtx) -> bytes:
        """Pickle the instance as Ray does; what refuses is a TypeError that names the attribute."""
        self.exchange(ctx)
        shares = self._theirs["runtime_env"] is self._ours["runtime_env"]

        def dumps(value: Any) -> bytes:
            return dumps_beside_config(value, ctx)

        try:
            return dumps((self.callback, self._own, shares))
        except Exception as error:  # any class can refuse in its own way
            refusal = attribute_refusal(self.callback.ctx, dumps, "ctx.")
            refusal = refusal or attribute_refusal(self.callback, dumps)
            if refusal:
                raise TypeError(refusal) from error
            raise

    @classmethod
    def unpacked(cls, data: bytes, ctx: CallbackCtx) -> RayInstance:
        """Return the instance in another process.

        Its objects come into our context, so that two names of one object stay that.
        """
        instance, own, shares = loads_beside_config(data, ctx)
        theirs = {name: getattr(instance.ctx, name) for name in _FIELDS}
        if shares:
            recorder_of(ctx).adopt(runtime_env=theirs["runtime_env"])
        custom_data = getattr(instance.ctx, "custom_data", None)
        if isinstance(custom_data, MutableMapping):
            known = {**ctx.custom_data, **custom_data}
            recorder_of(ctx).adopt(custom_data=known)
        loaded = cls(instance, {name: getattr(ctx, name) for name in _FIELDS}, theirs)
        loaded._known, loaded._own = dict(ctx.custom_data), own
        return loaded


def is_run_as_usual(callback: Any, method: str) -> bool:
    """Return whether Ray's own code would run a method, of an instance or class, and blame it."""
    runner = "run_callback_sync" if method == DOWNLOAD else "run_callback"
    return _ray.is_run_as_usual(callback, runner)


def has(callback: Any, method: str) -> bool:
    """Return whether anything runs for a method of Ray's, of an instance or a class."""
    own = _ray.overrides(callback, getattr(_ray.CallbackBase, method))
    return own or not is_run_as_usual(callback, method)


async def _called(method: Callable[[], Any]) -> None:
    result = method()
    if inspect.isawaitable(result):
        await result


async def _awaited(run: Callable[[], Any]) -> None:
    await run()


def _has(known: Mapping[Any, Any], key: Any, value: Any) -> bool:
    return key in known and known[key] is value


def _set_modes(ctx: CallbackCtx, value: Any) -> None:
    """Set what all nodes download; Ray downloads everything if it is none of its modes."""
    mode = NodeModelDownloadable.MODEL_AND_TOKENIZER
    if isinstance(value, NodeModelDownloadable | type(_ray.download_mode_of_ray(mode))):
        mode = NodeModelDownloadable.parse(value)
    elif value is not None:
        running = recorder_of(ctx).running
        logger.warning(
            "callback %r set worker_node_download_model to a %s, for which Ray downloads "
            "everything; set a member of its NodeModelDownloadable",
            running and running.callback,
            type(value).__name__,
        )
    recorder = recorder_of(ctx)
    assigned = set(recorder.assigned)
    ctx.local_node_download_model = ctx.worker_node_download_model = mode
    # In every mode Ray leaves a model of the Hub to the engine.
    recorder.assigned = assigned


def _set_placement_group(ctx: CallbackCtx, value: Any) -> None:
    ctx.placement_group = value


def _set_runtime_env(ctx: CallbackCtx, value: Any) -> None:
    ctx.runtime_env = {} if value is None else value


def _same(value: Any) -> Any:
    return value


_FIELDS: Mapping[str, tuple[Callable[[Any], Any], Callable[[CallbackCtx, Any], None]]] = {
    "worker_node_download_model": (_ray.download_mode_of_ray, _set_modes),
    "placement_group": (_same, _set_placement_group),
    "runtime_env": (_same, _set_runtime_env),
}
"""What Ray gives a callback's context: how it is said there, and how it is set in ours."""
