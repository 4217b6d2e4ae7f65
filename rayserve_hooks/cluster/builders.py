"""Ray's application builders, with callbacks: checked and configured where the app is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster.config import LLMConfig
from rayserve_hooks.cluster.configure import configured
from rayserve_hooks.cluster.stacks import checked, parse_settings
from rayserve_hooks.core.inspection import is_a
from rayserve_hooks.core.masking import shown
from rayserve_hooks.core.stack import CallbackStack
from rayserve_hooks.errors import CallbackConfigError, Problems

if TYPE_CHECKING:
    from ray.serve.deployment import Application

_PREFIXES = {"prefill_config": "Prefill:", "decode_config": "Decode:"}


def build_openai_app(llm_serving_args: Mapping[str, Any] | BaseModel) -> Application:
    """Build an app as ``ray.serve.llm.build_openai_app``, of configs with callbacks.

    Unlike with Ray's own builder, what is wrong with the callbacks of a YAML file is an error here,
    before a replica starts, and ``on_configure`` runs.

    Args:
        llm_serving_args: What Ray's builder takes. Each of ``llm_configs`` is an ``LLMConfig``, a
            mapping of its fields with ``callbacks``, ``callback`` or ``time_limits``, or the path
            of a YAML file with one.

    Returns:
        The application, for ``serve.run``.

    Raises:
        CallbackConfigError: Configs or callbacks are wrong; names all problems.
        HookError: A callback failed in ``on_configure``.
    """
    from ray.serve.llm import build_openai_app as build

    return build(_with_callbacks(llm_serving_args, "llm_configs"))


def build_dp_openai_app(dp_serving_args: Mapping[str, Any] | BaseModel) -> Application:
    """Build a data-parallel app as ``ray.serve.llm.build_dp_openai_app``, with callbacks.

    Args:
        dp_serving_args: What Ray's builder takes; for ``llm_config`` see `build_openai_app`.

    Returns:
        The application, for ``serve.run``.

    Raises:
        CallbackConfigError: The config or callbacks are wrong; names all problems.
        HookError: A callback failed in ``on_configure``.
    """
    from ray.serve.llm import build_dp_openai_app as build

    return build(_with_callbacks(dp_serving_args, "llm_config"))


def build_pd_openai_app(pd_serving_args: Mapping[str, Any] | BaseModel) -> Application:
    """Build a prefill and decode app as ``ray.serve.llm.build_pd_openai_app``, with callbacks.

    Args:
        pd_serving_args: What Ray's builder takes; for ``prefill_config`` and ``decode_config`` see
            `build_openai_app`. Each has callbacks of its own.

    Returns:
        The application, for ``serve.run``.

    Raises:
        CallbackConfigError: Configs or callbacks are wrong; names all problems.
        HookError: A callback failed in ``on_configure``.
    """
    from ray.serve.llm import build_pd_openai_app as build

    return build(_with_callbacks(pd_serving_args, *_PREFIXES))


def _with_callbacks(arguments: Mapping[str, Any] | BaseModel, *keys: str) -> dict[str, Any]:
    """Return a builder's arguments with configs that have been checked and configured."""
    if isinstance(arguments, BaseModel):
        arguments = {name: getattr(arguments, name) for name in type(arguments).model_fields}
    if not isinstance(arguments, Mapping):
        raise CallbackConfigError(f"the builder's argument is {shown(arguments)}; give a mapping")
    ours = dict(arguments)
    problems = Problems()
    for key in keys:
        if key in ours:  # or Ray says what is missing
            ours[key] = _each(ours[key], key, _Checked, problems)
    problems.raise_all()
    for key in keys:
        if key in ours:
            prefix = _PREFIXES.get(key, "")
            ours[key] = _each(ours[key], key, lambda one: one.configured(prefix), problems)  # noqa: B023 - is called at once
    problems.raise_all()
    return ours


def _each(value: Any, where: str, make: Any, problems: Problems) -> Any:
    """Return what ``make`` makes of a config, or of each in a list; its problems say where."""
    if where == "llm_configs":
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise CallbackConfigError(f"llm_configs is {shown(value)}; give a list")
        return [_each(one, f"{where}[{i}]", make, problems) for i, one in enumerate(value)]
    with problems.collected():
        try:
            return make(value)
        except CallbackConfigError as error:
            texts = (f"{where}: {text}" for text in error.problems)
            raise CallbackConfigError(*texts) from error
    return None


class _Checked:
    """A config of ours, made of what a builder was given, and its callbacks if it has any."""

    def __init__(self, value: object) -> None:
        try:
            self._config = _config(value)
        except ValidationError as error:
            raise CallbackConfigError(*_texts(error)) from None  # its input may hold secrets
        self._stack = _stack(self._config)

    def configured(self, prefix: str) -> LLMConfig:
        """Return the config as ``on_configure`` leaves it."""
        if self._stack is None:
            return self._config
        return configured(self._config, self._stack, f"{prefix}{self._config.model_id}")


def _config(value: object) -> LLMConfig:
    if isinstance(value, str):
        return LLMConfig.model_validate(_loaded(value))
    if isinstance(value, LLMConfig):
        return value
    if isinstance(value, Mapping):
        return LLMConfig.model_validate(dict(value))
    if isinstance(value, BaseModel) and "callback_config" in type(value).model_fields:
        fields = {name: getattr(value, name) for name in value.model_fields_set}
        return LLMConfig.model_validate(fields)
    raise CallbackConfigError(
        f"is {shown(value)}; give an LLMConfig, a mapping, or the path of a file with one"
    )


def _loaded(path: str) -> dict[str, Any]:
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # of the file, its encoding, or YAML
        raise CallbackConfigError(
            f"cannot read {path!r}: {str(error) or type(error).__name__}; name a file with one "
            "LLM config"
        ) from error
    if not isinstance(loaded, dict):
        raise CallbackConfigError(f"{path!r} holds no mapping; name an LLM config file")
    return loaded


def _stack(config: LLMConfig) -> CallbackStack | None:
    """Return a config's stack, checked; None if it has none of ours."""
    settings = config.callback_config
    if not _ray.is_hooks_slot(settings.callback_class):
        return None
    stack = settings.callback_kwargs.get("stack")
    if isinstance(stack, CallbackStack):  # checked where the config was made
        return replace(stack, configured=None)
    on_error = "raise" if settings.raise_error_on_callback else "warn"
    parsed = parse_settings(settings.callback_class, settings.callback_kwargs, on_error)
    return checked(parsed, config.model_id, config.runtime_env, config.server_cls)


def _texts(error: ValidationError) -> Iterator[str]:
    """Yield what is wrong with a config, in our words where we have found it."""
    for found in error.errors(include_url=False, include_input=False):
        cause = found.get("ctx", {}).get("error")
        if is_a(cause, CallbackConfigError):
            yield from cause.problems
        else:
            path = ".".join(map(str, found["loc"]))
            yield f"{path}: {found['msg']}" if path else found["msg"]
