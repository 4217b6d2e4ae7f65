"""The JSON Schema of a Serve config file, for editors: what may stand in a callback list."""

from __future__ import annotations

from typing import Any

from rayserve_hooks.cluster import _ray
from rayserve_hooks.core.arguments import arguments_model
from rayserve_hooks.core.limits import TimeLimits
from rayserve_hooks.core.loading import short_names
from rayserve_hooks.core.stack import CallbackEntry
from rayserve_hooks.core.validation import adapter

_SHIPPED = "rayserve_hooks.impls."


def config_schema() -> dict[str, Any]:
    """Return the schema; ``$defs`` has ``callbacks``, the list by itself.

    What is Ray's is left open. Of shipped callbacks the arguments are described, too; nothing
    else that is installed is imported.
    """
    entry = _nullable(adapter(CallbackEntry).json_schema(mode="validation"), "kwargs", "name")
    entry["description"] = "One callback."
    shipped = [name for name, ep in sorted(short_names().items()) if ep.value.startswith(_SHIPPED)]
    entry["allOf"] = [_arguments_of(name) for name in shipped]
    names = {"type": "string", "examples": sorted(short_names())}
    classes = [_ray.HOOKS_CALLBACK, ":".join(_ray.HOOKS_CALLBACK.rsplit(".", 1))]
    ours = {"properties": {"callback_class": {"enum": classes}}, "required": ["callback_class"]}
    limits = {**adapter(TimeLimits).json_schema(mode="validation"), "description": "In seconds."}
    one = {"$ref": "#/$defs/callback"}
    kwargs: dict[str, Any] = {
        "type": "object",
        "properties": {
            "callbacks": {"$ref": "#/$defs/callbacks"},
            "time_limits": {"anyOf": [limits, {"type": "null"}]},
        },
        "additionalProperties": False,
    }
    settings = {"if": ours, "then": {"properties": {"callback_kwargs": kwargs}}}
    # What our own builders take in each config, by whichever builder it is named.
    ours_alone = {**kwargs["properties"], "callback": {"anyOf": [one, {"type": "null"}]}}
    properties = {"callback_config": settings, **ours_alone}
    config = {"type": ["object", "string"], "properties": properties}
    named = dict.fromkeys(("llm_config", "prefill_config", "decode_config"), config)
    args = {"type": ["object", "string"], "properties": {"llm_configs": {"items": config}, **named}}
    application = {"type": "object", "properties": {"args": args}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A Ray Serve config file with rayserve_hooks callbacks",
        "type": "object",
        "properties": {"applications": {"type": "array", "items": application}},
        "$defs": {
            "callback": {"anyOf": [names, entry]},
            "callbacks": {"anyOf": [one, {"type": "array", "items": one}]},
        },
    }


def _nullable(schema: dict[str, Any], *names: str) -> dict[str, Any]:
    properties = schema["properties"]
    for name in names:
        properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
    return schema


def _arguments_of(name: str) -> dict[str, Any]:
    """Return the rule for the arguments of a shipped callback."""
    cls = short_names()[name].load()
    kwargs = arguments_model(cls.__init__.__wrapped__).model_json_schema(mode="validation")
    this = {"properties": {"callback": {"const": name}}, "required": ["callback"]}
    return {"if": this, "then": {"properties": {"kwargs": kwargs}}}
