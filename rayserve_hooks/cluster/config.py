"""`LLMConfig`: Ray's, with callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import (
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    field_serializer,
    model_validator,
)

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster._ray import LLMConfig as RayLLMConfig
from rayserve_hooks.cluster.placement import refuse_unplaceable
from rayserve_hooks.cluster.stacks import checked, expanded, needs_engine, parse
from rayserve_hooks.core.stack import CallbackEntry, CallbackStack
from rayserve_hooks.errors import CallbackConfigError


class LLMConfig(RayLLMConfig):
    """``ray.serve.llm.LLMConfig`` with callbacks; every other argument is as there.

    The callbacks are imported and built here, so that what is wrong with them is an error where
    the config is made. They are built once more in each process that runs them.

    Args:
        model_id: Short for ``model_loading_config={"model_id": model_id}``.
        callback: One callback. Short for ``callbacks=[callback]``.
        callbacks: The callbacks, in run order; forms: see
            `rayserve_hooks.core.stack.CallbackStack.parse`.
        time_limits: Seconds that steps of the initialization may take, by name; names and
            defaults: see `rayserve_hooks.core.limits.TimeLimits`.
        **fields: The fields of ``ray.serve.llm.LLMConfig``.

    Raises:
        pydantic.ValidationError: A field is wrong; for callbacks it wraps a
            ``CallbackConfigError`` whose text names the callback and says what to write.
    """

    # The input may hold secrets among the callbacks' kwargs.
    model_config = ConfigDict(hide_input_in_errors=True)

    callbacks: list[Any] = Field(
        default_factory=list, description="The callbacks of this deployment, in run order."
    )
    time_limits: dict[str, Any] = Field(
        default_factory=dict, description="Seconds that steps of the initialization may take."
    )

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            model_id: str | None = None,
            callback: object = None,
            callbacks: Sequence[object] = (),
            time_limits: Mapping[str, float | None] = ...,
            **fields: Any,
        ) -> None: ...

    @model_validator(mode="before")
    @classmethod
    def _expand_short_forms(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return expanded(data)

    @model_validator(mode="after")
    def _check_callbacks(self) -> LLMConfig:
        self._plug_in_callbacks()
        return self

    def _plug_in_callbacks(self) -> None:
        settings = self.callback_config
        if not self.callbacks and not self.time_limits and "stack" not in settings.callback_kwargs:
            return
        already = settings.callback_kwargs.get("callbacks")
        ours = _ray.runs_hooks(settings.callback_class)
        if not _same(already, self.callbacks) if already is not None else not ours:
            raise CallbackConfigError(
                "both callbacks and callback_config are given; list all callbacks in callbacks"
            )
        on_error = "raise" if settings.raise_error_on_callback else "warn"
        stack = parse(self.callbacks, self.time_limits, on_error)
        checked(stack, _ray.deployment_name(self.model_id), self.runtime_env, self.server_cls)
        # In place of the objects: what travels is the callbacks as they are configured here.
        self.callbacks = list(stack.entries)
        _ray.set_callback(self, None)
        self.callback_config = _ray.hooks_callback_config(stack, settings.raise_error_on_callback)

    def get_engine_config(self) -> Any:
        """Return the engine's part; Ray asks for it where it builds a deployment.

        There the deployment gets our engine class, if a callback has a hook that it runs.

        Raises:
            PlacementError: This process is connected to a cluster that can never hold a replica.
        """
        engine = self.unchecked_engine_config()
        refuse_unplaceable(self)
        stack = self.callback_config.callback_kwargs.get("stack")
        if (
            isinstance(stack, CallbackStack)
            and not _ray.in_actor()
            and needs_engine(stack, _ray.deployment_name(self.model_id))
        ):
            _ray.name_engine(self)
        return engine

    def get_or_create_callback(self) -> Any:
        """Return the callback in Ray's slot; outside of a replica no group is made for it."""
        from rayserve_hooks.cluster.slot import callback_of

        return callback_of(self)

    def unchecked_engine_config(self) -> Any:
        """Return the engine's part without a look at the cluster."""
        return super().get_engine_config()

    def model_copy(
        self, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> LLMConfig:
        """Return a copy; unlike other fields, callbacks and limits in ``update`` are checked."""
        copied = super().model_copy(update=update, deep=deep)
        if update and not {"callbacks", "time_limits"}.isdisjoint(update):
            copied._plug_in_callbacks()  # noqa: SLF001 - it is one of these
        return copied

    # What is dumped can be read again, by this class and, but for its own fields, by Ray's.

    @field_serializer("callbacks")
    def _write_callbacks(self, callbacks: Sequence[object], info: SerializationInfo) -> list[Any]:
        as_text = info.mode == "json"
        entries = (entry for entry in callbacks if isinstance(entry, CallbackEntry))
        return [entry.written(as_text) for entry in entries]

    @field_serializer("callback_config", mode="wrap")
    def _write_callback_config(
        self, settings: Any, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> Any:
        stack = settings.callback_kwargs.get("stack")
        if not isinstance(stack, CallbackStack):
            return handler(settings)
        kwargs = {"callbacks": self._write_callbacks(stack.entries, info)}
        if self.time_limits:
            kwargs["time_limits"] = dict(self.time_limits)  # type: ignore[assignment]
        return {
            "callback_class": settings.callback_class,
            "callback_kwargs": kwargs,
            "raise_error_on_callback": settings.raise_error_on_callback,
        }


def _same(already: Any, callbacks: list[Any]) -> bool:
    try:
        return bool(list(already) == callbacks)
    except Exception:  # a value of any class may refuse to be compared
        return False
