"""From a config, ours or Ray's, to its stack."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from plugins_for_tests import Plain, run_script, sent

from rayserve_hooks.cluster.ray_callback import adapt_ray_callback
from rayserve_hooks.cluster.stacks import get_plugin_manager, parse, parse_settings, stack_of
from rayserve_hooks.core.limits import TimeLimits
from rayserve_hooks.core.stack import DISABLE_VARIABLE, CallbackStack
from rayserve_hooks.errors import CallbackConfigError

OURS = "rayserve_hooks.HooksCallback"
# It asks Ray how to pickle what is defined in a notebook.
imports_ray = pytest.mark.slow


def config_of(*callbacks: object, raise_error: bool = True, **kwargs: Any) -> Any:
    """Return a stand-in for a config of Ray's."""
    return SimpleNamespace(
        model_id="m",
        callback_config=SimpleNamespace(
            callback_class=OURS,
            callback_kwargs={"callbacks": list(callbacks), **kwargs},
            raise_error_on_callback=raise_error,
        ),
    )


def test_a_stack_is_read_from_a_callback_config() -> None:
    kwargs = {"callbacks": [Plain], "time_limits": {"total": 60}}
    stack = parse_settings(OURS, kwargs, "warn")
    assert [entry.name for entry in stack.entries] == ["Plain"]
    assert (stack.on_error, stack.time_limits) == ("warn", TimeLimits(total=60))


@pytest.mark.parametrize("named", [OURS, "rayserve_hooks:HooksCallback"])
def test_a_stack_without_anything_is_empty(named: str) -> None:
    assert parse_settings(named, {}) == CallbackStack(adapt=adapt_ray_callback)


def test_another_callback_class_is_a_stack_of_one() -> None:
    (entry,) = parse_settings("ray_callbacks:Strict", {"paths": []}).entries
    assert (entry.name, entry.kwargs) == ("Strict", {"paths": []})


def test_an_unknown_key_of_callback_kwargs() -> None:
    text = (
        "callback_kwargs has unknown key 'callback'; HooksCallback takes 'callbacks', a list, and "
        "'time_limits', a mapping"
    )
    with pytest.raises(CallbackConfigError, match=f"^{text}$"):
        parse_settings(OURS, {"callback": "x"})


def test_keys_callbacks_and_limits_that_are_wrong_are_reported_together() -> None:
    kwargs = {"zzz": 1, "callbacks": [None], "time_limits": {"total": 0}}
    with pytest.raises(CallbackConfigError) as caught:
        parse_settings(OURS, kwargs)
    assert [problem.partition(" ")[0] for problem in caught.value.problems] == [
        "callback_kwargs",
        "callbacks[0]",
        "time_limits:",
    ]


def test_nothing_is_written_back_into_the_settings() -> None:
    kwargs = {"callbacks": [{"callback": Plain, "kwargs": {"greeting": "hi"}}], "time_limits": {}}
    before = copy.deepcopy(kwargs)
    stack = parse_settings(OURS, kwargs)
    stack.build()
    assert kwargs == before
    parse_settings("ray_callbacks:Strict", given := {"paths": ["a"]})
    assert given == {"paths": ["a"]}


def test_the_settings_of_another_class_are_not_shared_either() -> None:
    kwargs = {"paths": ["a"]}
    stack = parse_settings("ray_callbacks:Strict", kwargs)
    kwargs["paths"].append("b")
    assert stack.entries[0].kwargs == {"paths": ["a"]}


def test_reading_a_list_imports_no_ray() -> None:
    script = """
        import sys
        from rayserve_hooks.cluster.stacks import parse_settings

        stack = parse_settings("rayserve_hooks.HooksCallback", {"callbacks": ["download_policy"]})
        print(len(stack.build()), "ray" in sys.modules)
    """
    assert run_script(script) == "1 False"


def test_a_list_that_may_name_rays_callbacks_travels_with_what_adapts_them() -> None:
    stack = parse([Plain], None, "raise")
    assert sent(stack).adapt is adapt_ray_callback


@imports_ray
def test_the_stack_of_a_config_of_ray_is_that_of_its_settings() -> None:
    stack = stack_of(config_of(Plain, raise_error=False, time_limits={"total": 60}))
    assert [entry.name for entry in stack.entries] == ["Plain"]
    assert (stack.on_error, stack.time_limits.total, stack.deployment) == ("warn", 60, "m")


@imports_ray
def test_a_stack_that_is_in_the_config_is_taken_as_it_is() -> None:
    stack = parse([Plain], None, "warn")
    config = config_of()
    config.callback_config.callback_kwargs = {"stack": stack}
    assert stack_of(config) == stack.for_deployment("m")


@imports_ray
def test_reading_a_config_leaves_it_as_it_is() -> None:
    config = config_of({"callback": Plain, "kwargs": {"greeting": "hi"}})
    before = copy.deepcopy(config.callback_config)
    get_plugin_manager(config)
    assert config.callback_config == before


@imports_ray
def test_a_callback_is_switched_off_in_a_config_of_ray_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLE_VARIABLE, "Plain")
    assert stack_of(config_of(Plain)).entries == ()


@imports_ray
def test_a_config_of_ray_with_an_instance_keeps_one_manager() -> None:
    config = config_of(Plain("mine"))
    assert get_plugin_manager(config) is get_plugin_manager(config)


@imports_ray
def test_an_instance_in_a_config_of_ray_travels_as_it_was_configured() -> None:
    instance = Plain("as configured")
    stack = stack_of(config_of(instance))
    instance.greeting = "changed by a hook"
    ((_, copied),) = sent(stack).build()
    assert copied.greeting == "as configured"  # type: ignore[attr-defined]


@imports_ray
def test_an_instance_in_a_config_of_ray_that_cannot_travel_is_refused() -> None:
    instance = Plain()
    instance.stream = (number for number in range(1))  # type: ignore[attr-defined]
    text = (
        "callback 'Plain' cannot be sent to another process: .* its attribute 'stream', a "
        "generator: "
    )
    with pytest.raises(CallbackConfigError, match=text):
        stack_of(config_of(instance))


@imports_ray
@pytest.mark.parametrize("how", ["Here", "Here()"])
@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        (
            "client = functools.cached_property(print)",
            "attribute 'client', a cached_property: cannot pickle '_thread.RLock' object",
        ),
        (
            "lock = threading.Lock()",
            "attribute 'lock', a lock: cannot pickle '_thread.lock' object",
        ),
    ],
)
def test_a_class_of_a_notebook_that_cannot_travel_says_so(
    how: str, attribute: str, reason: str
) -> None:
    script = f"""
        import functools, threading
        from ray import cloudpickle
        from rayserve_hooks.core.stack import CallbackStack

        class Here:
            {attribute}
            def on_before_init(self, ctx): ...

        try:
            CallbackStack.parse([{how}]).freeze(cloudpickle.dumps)
        except ValueError as error:
            print(error)
    """
    assert run_script(script) == (
        "callback 'Here' cannot be sent to another process: its class is in '__main__', which is "
        f"another module there, and does not pickle for its {reason}; define the class in a module "
        "that replicas have"
    )


@imports_ray
def test_a_class_of_a_notebook_travels(tmp_path: Any) -> None:
    """In one process it is in ``__main__``; the other has another ``__main__``, or none."""
    file = tmp_path / "stack.pickle"
    made = """
        import sys
        from pathlib import Path
        from types import SimpleNamespace
        from ray import cloudpickle
        from rayserve_hooks.cluster.stacks import stack_of

        class Here:
            def __init__(self, size=1):
                self.size = size
            def on_before_init(self, ctx):
                return None

        settings = SimpleNamespace(
            callback_class="rayserve_hooks.HooksCallback",
            callback_kwargs={"callbacks": [
                {"callback": Here(3), "name": "instance"},
                {"callback": Here, "name": "class", "kwargs": {"size": 2}},
            ]},
            raise_error_on_callback=True,
        )
        stack = stack_of(SimpleNamespace(model_id="m", callback_config=settings))
        Path(sys.argv[1]).write_bytes(cloudpickle.dumps(stack))
    """
    run_script(made, str(file))
    built = [plugin.size for _, plugin in pickle.loads(file.read_bytes()).build()]
    assert built == [3, 2]
