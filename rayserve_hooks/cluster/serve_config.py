"""Reads a Serve config file: its LLM configs, and what is wrong with them; needs no Ray."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from rayserve_hooks.cluster import _ray, ray_schema
from rayserve_hooks.cluster.ray_callback import adapt_ray_callback
from rayserve_hooks.cluster.stacks import expanded, parse_settings, refuse_server
from rayserve_hooks.core.hooks import CLEAN_UP, CONFIGURE, ENGINE_PROCESS, NEED_ENGINE, RUNS_IN
from rayserve_hooks.core.masking import shown
from rayserve_hooks.core.stack import CallbackStack
from rayserve_hooks.errors import CallbackConfigError, Problems

_PAIRS = (ray_schema.PrefillDecodeArgs, ray_schema.PrefillDecodeArgsWithProxy)
_ARGUMENTS = ("llm_configs", "llm_config", "prefill_config", "decode_config")
_LOOKED_FOR = (
    f"looked in the args of each application for {', '.join(_ARGUMENTS)}, as "
    f"{', '.join(ray_schema.BUILDERS)} take them"
)


@dataclass(kw_only=True)
class _OurLLMConfig(ray_schema.LLMConfig):
    """``rayserve_hooks.LLMConfig``, which our builders take, its short forms expanded."""

    callbacks: Any = None
    time_limits: Any = None


@dataclass(frozen=True)
class Deployment:
    """An LLM config of a Serve config.

    Attributes:
        name: A name of its deployment.
        stack: Its callbacks.
        llm_config: The config as it is written.
        runtime_env: That of its application.
        left_out: The hooks that do not run with the builder that the file names, each with the
            reason.
    """

    name: str
    stack: CallbackStack
    llm_config: Mapping[Any, Any] = dataclasses.field(repr=False)
    runtime_env: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, str]:
        """The variables that the application and the LLM config set in a replica."""
        variables: dict[str, str] = {}
        for runtime_env in (self.runtime_env, self.llm_config.get("runtime_env")):
            found = runtime_env.get("env_vars") if isinstance(runtime_env, Mapping) else None
            if isinstance(found, Mapping):
                variables |= {str(name): str(value) for name, value in found.items()}
        return variables


@dataclass
class ServeConfig:
    """What a Serve config says of callbacks.

    Attributes:
        deployments: Its LLM configs.
        unseen: What cannot be read from the file, in words.
    """

    deployments: list[Deployment] = dataclasses.field(default_factory=list)
    unseen: list[str] = dataclasses.field(default_factory=list)

    @property
    def stacks(self) -> list[tuple[str, CallbackStack]]:
        """Of each LLM config a name of its deployment, and its callbacks."""
        return [(deployment.name, deployment.stack) for deployment in self.deployments]


def read(path: str, problems: Problems) -> ServeConfig:
    """Read a Serve config file and the files of LLM configs that it names.

    Args:
        path: The file that ``serve run`` and ``serve deploy`` take.
        problems: Gets what is wrong, all of it.

    Raises:
        CallbackConfigError: The file is no Serve config, or no LLM config is in it.
    """
    return _Reader(problems).file(path)


class _Reader:
    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._found = ServeConfig()
        self._seen = False  # an LLM config, however wrong

    def file(self, path: str) -> ServeConfig:
        whole = _load(path, "Serve config")
        applications = whole.get("applications")
        if not isinstance(applications, list):
            raise CallbackConfigError(
                f"{path!r} has no list 'applications'; name a Serve config file"
            )
        self._check(ray_schema.ServeDeploy, whole, repr(path))
        named = [application for application in applications if isinstance(application, Mapping)]
        for key, default in (("name", "default"), ("route_prefix", "/")):
            self._unique(key, [application.get(key, default) for application in named], repr(path))
        for application in applications:
            with self._problems.collected():
                if not isinstance(application, Mapping):
                    raise CallbackConfigError(
                        f"{path!r}: applications holds {shown(application)}, no mapping; write one "
                        "for each application"
                    )
                self._application(application)
        if not self._seen and not self._problems:
            unseen = "".join(f"; {text}" for text in self._found.unseen)
            raise CallbackConfigError(
                f"{path!r} has no LLM config: {_LOOKED_FOR}{unseen}; add one, or name another file"
            )
        return self._found

    def _application(self, application: Mapping[Any, Any]) -> None:
        name = _text(application.get("name", "default"))
        self._check(ray_schema.Application, application, name)
        arguments = _mapping(application.get("args", {}), f"{name}: args")
        import_path = application.get("import_path")
        builder = arguments_of(import_path)
        if builder is not None:
            self._check(builder, arguments, f"{name}: args")
            ingress = arguments.get("ingress_cls_config")
            if isinstance(ingress, Mapping):
                self._check(ray_schema.IngressCls, ingress, f"{name}: args: ingress_cls_config")
        elif isinstance(import_path, str) and not set(_ARGUMENTS) & set(arguments):
            self._found.unseen.append(
                f"{name}: {import_path!r} is Python, which is not run here; callbacks of an "
                "LLMConfig that is made there are checked when it is made"
            )
        listed = arguments.get("llm_configs", [])
        if builder is None and not isinstance(listed, list):
            self._report(f"{name}: args: llm_configs is {shown(listed)}; write a list")
        models = []
        ours = isinstance(import_path, str) and import_path.startswith("rayserve_hooks")
        for where, config, prefix in _configs(arguments):
            self._seen = True
            with self._problems.collected():
                models.append(self._llm_config(application, where, config, prefix, ours))
        if builder is ray_schema.OpenAIArgs:
            self._unique("model_id", [_model_id(model) for model in models], f"{name}: llm_configs")
            if arguments.get("llm_configs") == []:
                self._report(f"{name}: llm_configs is []; add an LLM config")
        if builder in _PAIRS and len(models) == 2:
            self._pair(name, *models)

    def _llm_config(
        self,
        application: Mapping[Any, Any],
        where: str,
        config: object,
        prefix: str,
        ours: bool,
    ) -> Mapping[Any, Any]:
        application_name = _text(application.get("name", "default"))
        where = f"{application_name}: {where}"
        # Ray takes the path of a file that holds the config, too.
        llm_config = (
            _load(config, "LLM config") if isinstance(config, str) else _mapping(config, where)
        )
        if ours:
            llm_config = _expanded(llm_config, where)
        name = f"{application_name}/{prefix}{_text(_model_id(llm_config))}"
        kind: type = _OurLLMConfig if ours else ray_schema.LLMConfig
        self._check(kind, llm_config, name)
        for part, kind in ray_schema.PARTS.items():
            if part == "placement_group_config" and llm_config.get("server_cls") is not None:
                continue  # another engine's server reads keys of its own
            inner = llm_config.get(part)
            if isinstance(inner, Mapping):
                self._check(kind, inner, f"{name}: {part}")
        source = _get(llm_config, "model_loading_config", "model_source")
        if isinstance(source, Mapping):
            self._check(ray_schema.ModelSource, source, f"{name}: model_source")
        for text in _refused_values(llm_config):
            self._report(f"{name}: {text}")
        left_out = {} if ours else _left_out(llm_config)
        settings = llm_config.get("callback_config", {})
        if ours and (llm_config.get("callbacks") or llm_config.get("time_limits")):
            if settings:
                self._report(
                    f"{name}: both callbacks and callback_config are given; list all callbacks in "
                    "callbacks"
                )
            keys = ("callbacks", "time_limits")
            kwargs = {key: llm_config[key] for key in keys if llm_config.get(key) is not None}
            settings = {"callback_class": _ray.HOOKS_CALLBACK, "callback_kwargs": kwargs}
        if isinstance(settings, Mapping):
            with self._problems.collected():
                try:
                    runtime_env = _runtime_env(application)
                    found = Deployment(name, _stack(settings), llm_config, runtime_env, left_out)
                    environment = {**os.environ, **found.variables}
                    stack = found.stack.for_deployment(name, environment)
                    if stack.entries:
                        refuse_server(llm_config.get("server_cls"))
                    self._found.deployments.append(replace(found, stack=stack))
                except CallbackConfigError as error:
                    texts = (f"{name}: {text}" for text in error.problems)
                    raise CallbackConfigError(*texts) from error
        return llm_config

    def _pair(self, name: str, prefill: Mapping[Any, Any], decode: Mapping[Any, Any]) -> None:
        if _model_id(prefill) != _model_id(decode):
            self._report(f"{name}: model_id of prefill_config and decode_config differ; use one")
        paths = [
            _get(config, "lora_config", "dynamic_lora_loading_path") for config in (prefill, decode)
        ]
        without = [config.get("lora_config") is None for config in (prefill, decode)]
        if _ray.compares_adapters() and not (_same(*paths) and _same(*without)):
            self._report(f"{name}: lora_config of prefill_config and decode_config differ; use one")
        for key, config in (("prefill_config", prefill), ("decode_config", decode)):
            if _get(config, "engine_kwargs", "kv_transfer_config") is None:
                self._report(
                    f"{name}: {key}: engine_kwargs has no key 'kv_transfer_config'; add it"
                )

    def _check(self, kind: type, value: Mapping[Any, Any], where: str) -> None:
        for text in ray_schema.problems(kind, value, where):
            self._report(text)

    def _unique(self, key: str, values: list[object], where: str) -> None:
        texts = [value for value in values if isinstance(value, str)]
        for text in sorted({text for text in texts if texts.count(text) > 1}):
            self._report(f"{where}: {key} {text!r} is there more than once; give each its own")

    def _report(self, text: str) -> None:
        with self._problems.collected():
            raise CallbackConfigError(text)


def arguments_of(import_path: object) -> type | None:
    """Return what stands for the arguments of one of Ray's builders; None for anything else."""
    if not isinstance(import_path, str):
        return None
    module, _, function = import_path.replace(":", ".").rpartition(".")
    found = ray_schema.BUILDERS.get(f"{module}:{function}")
    if found is ray_schema.PrefillDecodeArgs and _ray.takes_a_proxy():
        return ray_schema.PrefillDecodeArgsWithProxy
    return found


def _expanded(config: Mapping[Any, Any], where: str) -> Mapping[Any, Any]:
    try:
        return expanded(config)
    except CallbackConfigError as error:
        raise CallbackConfigError(*(f"{where}: {text}" for text in error.problems)) from error


def _left_out(config: Mapping[Any, Any]) -> dict[str, str]:
    """Return which hooks Ray's own builders leave out, and what to do about it."""
    ours = "build the app with rayserve_hooks:build_openai_app, or its other forms"
    left_out = {CONFIGURE: f"not run by Ray's builder; {ours}"}
    variables = _get(config, "runtime_env", "env_vars")
    named = variables.get(_ray.ENGINE_VARIABLE) if isinstance(variables, Mapping) else None
    if named != _ray.HOOKS_ENGINE:
        for hook in NEED_ENGINE:
            left_out[hook] = f"not run by Ray's engine; {ours}"
        left_out[CLEAN_UP] = f"{RUNS_IN[CLEAN_UP]}, but not once the nodes are ready; {ours}"
        left_out[ENGINE_PROCESS] = f"{RUNS_IN[ENGINE_PROCESS]}, unchecked; {ours}"
    return left_out


def _configs(arguments: Mapping[Any, Any]) -> Iterator[tuple[str, object, str]]:
    """Yield each LLM config with where it stands, and Serve's prefix of its deployment's name."""
    listed = arguments.get("llm_configs")
    for index, config in enumerate(listed if isinstance(listed, list) else ()):
        yield f"llm_configs[{index}]", config, ""
    for key, prefix in (
        ("llm_config", ""),
        ("prefill_config", "Prefill:"),
        ("decode_config", "Decode:"),
    ):
        if key in arguments:
            yield key, arguments[key], prefix


def _stack(settings: Mapping[Any, Any]) -> CallbackStack:
    kwargs = _mapping(settings.get("callback_kwargs", {}), "callback_kwargs")
    named = settings.get("callback_class")
    if not isinstance(named, str):
        if named is None and kwargs:
            raise CallbackConfigError(
                "callback_config has no key 'callback_class', and Ray's default runs nothing; add "
                f"'callback_class: {_ray.HOOKS_CALLBACK}'"
            )
        return CallbackStack()
    on_error = "raise" if settings.get("raise_error_on_callback", True) else "warn"
    stack = parse_settings(named, kwargs, on_error)
    return stack if _ray.runs_hooks(named) else replace(stack, adapt=_adapt_only_rays)


def _adapt_only_rays(found: object, kwargs: Mapping[str, Any]) -> object:
    adapted = adapt_ray_callback(found, kwargs)
    if adapted is None:
        name = getattr(found, "__name__", type(found).__name__)
        raise CallbackConfigError(
            f"callback_class names {name}, which is no callback of Ray's kind; write "
            f"'callback_class: {_ray.HOOKS_CALLBACK}', and name it in callback_kwargs: "
            "{callbacks: [...]}"
        )
    return adapted


def _refused_values(config: Mapping[Any, Any]) -> Iterator[str]:
    """Yield what Ray refuses for more than a key or a kind of value."""
    if config.get("log_engine_metrics", True) and _get(
        config, "engine_kwargs", "disable_log_stats"
    ):
        yield "disable_log_stats is set; set log_engine_metrics to false, too, or drop it"
    if _get(config, "experimental_configs", "num_router_replicas") is not None:
        yield "experimental_configs has key 'num_router_replicas'; write num_ingress_replicas"
    for key in ("placement_group_bundles", "placement_group_strategy"):
        if _get(config, "deployment_config", key) is not None:
            yield f"deployment_config has key {key!r}; use placement_group_config instead"
    accelerator = config.get("accelerator_config")
    if isinstance(accelerator, Mapping) and "kind" not in accelerator:
        yield "accelerator_config has no key 'kind'; add it"
    group = config.get("placement_group_config")
    if isinstance(group, Mapping) and group and config.get("server_cls") is None:
        given = [key for key in ("bundles", "bundle_per_worker") if group.get(key) is not None]
        if len(given) != 1:
            yield "placement_group_config needs one of bundles and bundle_per_worker; give one"


def _runtime_env(application: Mapping[Any, Any]) -> Mapping[str, Any]:
    found = application.get("runtime_env")
    return found if isinstance(found, Mapping) else {}


def _model_id(config: Mapping[Any, Any]) -> object:
    named = _get(config, "model_loading_config", "model_id")
    return "?" if named is None else named


def _get(config: Mapping[Any, Any], outer: str, key: str) -> object:
    inner = config.get(outer)
    return inner.get(key) if isinstance(inner, Mapping) else None


def _same(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other


def _mapping(value: object, where: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise CallbackConfigError(f"{where} is {shown(value)}; write a mapping")
    return value


def _text(name: object) -> str:
    return name if isinstance(name, str) else shown(name)


def _load(path: str, what: str) -> Mapping[Any, Any]:
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # of the file, its encoding, YAML, or a value that YAML makes
        raise CallbackConfigError(
            f"cannot read {path!r}: {str(error) or type(error).__name__}; name a file with one "
            f"{what}"
        ) from error
    if not isinstance(loaded, dict):
        raise CallbackConfigError(f"{path!r} holds no mapping; name a {what} file")
    return cast("Mapping[Any, Any]", loaded)
