"""`LLMConfig`: Ray's, with callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field, model_validator
from ray import cloudpickle
from ray.serve.llm import LLMConfig as RayLLMConfig

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster.stacks import parse
from rayserve_hooks.core.manager import manager_of
from rayserve_hooks.errors import CallbackConfigError, Problems


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
        data = dict(data)
        model_id = data.pop("model_id", None)
        if model_id is not None:
            loading = data.setdefault("model_loading_config", {"model_id": model_id})
            named = loading.get("model_id") if isinstance(loading, dict) else loading.model_id
            if named is None:
                data["model_loading_config"] = {**loading, "model_id": model_id}
            elif named != model_id:
                raise CallbackConfigError(
                    f"model_id {model_id!r} and model_loading_config's model_id {named!r} "
                    "differ; give one of them"
                )
        callback = data.pop("callback", None)
        if callback is not None:
            if data.get("callbacks"):
                raise CallbackConfigError(
                    "both callback and callbacks are given; list all of them in callbacks"
                )
            data["callbacks"] = [callback]
        return data

    @model_validator(mode="after")
    def _plug_in_callbacks(self) -> LLMConfig:
        if not self.callbacks and not self.time_limits:
            return self
        settings = self.callback_config
        ours = _ray.runs_hooks(settings.callback_class)
        if not ours or settings.callback_kwargs.get("callbacks"):
            already = settings.callback_kwargs.get("callbacks")
            if not already or list(already) != self.callbacks:
                raise CallbackConfigError(
                    "both callbacks and callback_config are given; list all callbacks in callbacks"
                )
        stack = parse(
            self.callbacks,
            self.time_limits,
            "raise" if settings.raise_error_on_callback else "warn",
        )
        problems = Problems()
        with problems.collected():
            manager_of(stack.for_deployment(_ray.deployment_name(self.model_id)).here())
        with problems.collected():
            stack.freeze(cloudpickle.dumps)
        problems.raise_all()
        # In place of the objects: what travels is the callbacks as they are configured here.
        self.callbacks = list(stack.entries)
        self.callback_config = _ray.hooks_callback_config(stack, settings.raise_error_on_callback)
        return self
