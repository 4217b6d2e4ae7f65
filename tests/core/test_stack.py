"""From a config's list to the frozen stack that travels."""

import copy
import dataclasses
import enum
import pickle
import re
import shlex
from dataclasses import dataclass, replace
from typing import Any

import pytest
from plugins_for_tests import (
    Plain,
    Strict,
    hook_log,
    make_stack,
    one,
    parse_callbacks,
    refused,
    sent,
)
from steps import EXITS, step

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.limits import TimeLimits
from rayserve_hooks.core.masking import shown
from rayserve_hooks.core.stack import DISABLE_VARIABLE, CallbackEntry, CallbackStack, Configured
from rayserve_hooks.errors import CallbackConfigError


def test_a_mapping_gives_kwargs_name_and_on_error() -> None:
    entry = one(
        {
            "callback": "plugins_for_tests:Plain",
            "kwargs": {"greeting": "hi"},
            "name": "greeter",
            "on_error": "warn",
        }
    )
    assert (entry.name, entry.on_error) == ("greeter", "warn")
    plugin = entry.create()
    assert isinstance(plugin, Plain)
    assert plugin.greeting == "hi"


def test_a_mapping_needs_no_more_than_the_callback() -> None:
    entry = one({"callback": Plain})
    assert (entry.name, entry.on_error, entry.kwargs) == ("Plain", None, {})


@pytest.mark.parametrize("empty", [None, {}])
def test_kwargs_may_be_left_empty_in_yaml(empty: object) -> None:
    assert one({"callback": Plain, "kwargs": empty}).kwargs == {}


def test_one_callback_needs_no_list() -> None:
    assert [entry.name for entry in parse_callbacks("plugins_for_tests:Plain")] == ["Plain"]
    assert [entry.name for entry in parse_callbacks({"callback": Plain})] == ["Plain"]


def test_entries_are_taken_as_they_are() -> None:
    entry = one(Plain)
    assert parse_callbacks((entry,)) == (entry,)


def test_the_same_class_may_be_stacked_twice_under_two_names() -> None:
    entries = parse_callbacks([Plain, {"callback": Plain, "name": "again"}])
    assert [entry.name for entry in entries] == ["Plain", "again"]


@pytest.mark.parametrize("item", [True, False, None, 3, 1.5, [], (1, "a")])
def test_an_item_that_names_nothing(item: object) -> None:
    text = (
        f"callbacks[1] is {shown(item)}; write a string such as 'pkg.module:Class', a class, an "
        "instance, a module, or a mapping with 'callback'"
    )
    with refused(text):
        parse_callbacks([Plain, item])


def test_none_is_no_list() -> None:
    with refused("callbacks[0] is None; write a string such as"):
        parse_callbacks(None)


def test_an_unknown_key() -> None:
    text = (
        "callbacks[0] has unknown key 'kwarg'; did you mean 'kwargs'?; "
        "known keys: callback, kwargs, name, on_error, only_on_cluster"
    )
    with refused(text):
        parse_callbacks([{"callback": Plain, "kwarg": {}}])


@pytest.mark.parametrize("item", [{}, {"kwargs": {}}, {"callback": None}])
def test_a_mapping_without_a_callback(item: object) -> None:
    with refused("callbacks[0] names no callback; add 'callback: pkg.module:Class'"):
        parse_callbacks([item])


def test_kwargs_that_are_no_mapping() -> None:
    with refused("callbacks[0]: kwargs is list; write a mapping of argument names"):
        parse_callbacks([{"callback": Plain, "kwargs": ["greeting"]}])


@pytest.mark.parametrize("wrong", ["ignore", "", False, ["warn"]])
def test_a_wrong_on_error(wrong: object) -> None:
    with refused(f"callbacks[0]: on_error is {wrong!r}; use one of raise, warn"):
        parse_callbacks([{"callback": Plain, "on_error": wrong}])


@pytest.mark.parametrize("wrong", ["", 7, ["a"], True])
def test_a_wrong_name(wrong: object) -> None:
    with refused(f"callbacks[0]: name is {wrong!r}; write a string"):
        parse_callbacks([{"callback": Plain, "name": wrong}])


@pytest.mark.parametrize("wrong", [True, 3, []])
def test_a_mapping_whose_callback_names_nothing(wrong: object) -> None:
    text = (
        f"callbacks[0]: callback is {wrong!r}; write a string such as 'pkg.module:Class', a "
        "class, an instance or a module"
    )
    with refused(text):
        parse_callbacks([{"callback": wrong}])


ABSENT = {"callback": "only_there:Fetch", "only_on_cluster": True}


def test_a_callback_that_is_only_on_the_cluster_is_not_imported_to_check_it() -> None:
    stack = CallbackStack.parse([ABSENT, Plain])
    assert [(entry.name, entry.only_on_cluster) for entry in stack.entries] == [
        ("Fetch", True),
        ("Plain", False),
    ]
    assert [entry.name for entry, _ in stack.here().build()] == ["Plain"]


def test_what_is_wrong_with_it_is_found_there() -> None:
    with refused("callback 'only_there:Fetch': no module named 'only_there'"):
        CallbackStack.parse([ABSENT]).build()


def test_without_it_a_callback_is_checked() -> None:
    with refused("callback 'only_there:Fetch': no module named 'only_there'"):
        CallbackStack.parse([{**ABSENT, "only_on_cluster": False}]).here().build()


@pytest.mark.parametrize("wrong", ["true", 1, None])
def test_only_on_cluster_is_a_yes_or_no(wrong: object) -> None:
    text = (
        f"callbacks[0]: only_on_cluster is {wrong!r} for callback 'only_there:Fetch'; write true, "
        "and name the callback by a string"
    )
    with refused(text):
        parse_callbacks([{**ABSENT, "only_on_cluster": wrong}])


def test_what_is_here_is_not_only_on_the_cluster() -> None:
    text = (
        f"callbacks[0]: only_on_cluster is True for callback {Plain!r}; write true, and name the "
        "callback by a string"
    )
    with refused(text):
        parse_callbacks([{"callback": Plain, "only_on_cluster": True}])


def test_a_problem_of_the_list_comes_with_those_of_its_callbacks() -> None:
    with pytest.raises(CallbackConfigError) as caught:
        parse_callbacks([None, "no_such_module:Other", ABSENT])
    first, second = caught.value.problems
    assert first.startswith("callbacks[0] is None")
    assert second.startswith("callback 'no_such_module:Other': no module named")


def test_the_same_name_twice() -> None:
    text = (
        "callbacks has more than one callback named 'Plain'; give each its own name: "
        "{callback: ..., name: ...}"
    )
    with refused(text):
        parse_callbacks([Plain, "plugins_for_tests:Plain"])


def test_kwargs_for_an_instance() -> None:
    text = (
        "callback 'Plain': kwargs ['greeting'] given for an instance, which is already built; "
        "pass the class instead, or drop kwargs"
    )
    with refused(text):
        parse_callbacks([{"callback": Plain(), "kwargs": {"greeting": "hi"}}])


def test_freeze_refuses_kwargs_that_hold_a_stream() -> None:
    text = (
        "callback 'Plain' cannot be sent to another process: TypeError: cannot pickle 'generator' "
        "object; give plain values as kwargs, and open clients in the hooks"
    )
    entry = one({"callback": Plain, "kwargs": {"greeting": (number for number in range(1))}})
    with refused(text):
        entry.freeze(pickle.dumps)


def test_a_class_travels_with_its_kwargs_and_is_built_there() -> None:
    entry = one({"callback": Plain, "kwargs": {"greeting": "hi"}, "name": "a", "on_error": "warn"})
    copy = sent(entry)
    assert (copy.name, copy.on_error) == ("a", "warn")
    plugin = copy.create()
    assert isinstance(plugin, Plain)
    assert plugin.greeting == "hi"


@pytest.mark.parametrize(
    "callback",
    [Plain, "plugins_for_tests:Plain", Plain("mine"), {"callback": Plain, "kwargs": {"a": [1]}}],
)
def test_the_key_is_the_same_in_another_process(callback: object) -> None:
    entry = one(callback)
    assert sent(entry).key == entry.key


def test_two_lists_with_the_same_instance_ask_for_the_same_plugin() -> None:
    instance = Plain()
    assert one(instance).key == one(instance).key


@pytest.mark.parametrize(
    "other",
    [
        Strict,
        {"callback": Plain, "kwargs": {"greeting": "hi"}},
        {"callback": Plain, "name": "other"},
        {"callback": Plain, "on_error": "warn"},
        Plain(),
    ],
)
def test_entries_that_differ_have_different_keys(other: object) -> None:
    assert one(other).key != one(Plain).key


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("one_value", "other_value"),
    [
        ((1, 2), [1, 2]),
        ({1: "a"}, {"1": "a"}),
        (1, True),
        (1, 1.0),
        (1, "1"),
        (0.0, -0.0),
        (None, "None"),
        (b"a", "a"),
        (b"a", "b'a'"),
        ({1}, frozenset({1})),
        ({1}, [1]),
        ({}, []),
        ({"a": {True: 1}}, {"a": {1: 1}}),
        ([["a"], "b"], [["a", "b"]]),
        (Colour.RED, 1),
        (object(), object()),
        ([object()], [object()]),
    ],
)
def test_arguments_that_differ_have_different_keys(one_value: object, other_value: object) -> None:
    def key(value: object) -> object:
        return one({"callback": Plain, "kwargs": {"greeting": value}}).key

    assert key(one_value) != key(other_value)
    assert key(one_value) == key(one_value)
    assert key({"a": one_value, "b": 2}) == key({"b": 2, "a": one_value})


def test_arguments_that_are_no_number_have_one_key() -> None:
    def key() -> object:
        return one({"callback": Plain, "kwargs": {"greeting": float("nan")}}).key

    assert key() == key()


def test_an_object_that_is_gone_leaves_its_name_to_no_other() -> None:
    keys = {one(Plain(str(number))).key for number in range(100)}
    assert len(keys) == 100


@pytest.mark.parametrize("value", [{(1, 2): "a"}, {1: "a", "b": 2}, {1, 2}, object()])
def test_kwargs_of_any_kind_have_a_key(value: object) -> None:
    entry = one({"callback": Plain, "kwargs": {"greeting": value}})
    assert entry.key == entry.key
    assert hash(entry.key)


def test_repr_names_kwargs_and_hides_their_values() -> None:
    entry = one({"callback": Plain, "kwargs": {"greeting": "s3cret"}, "name": "mine"})
    assert repr(entry) == (
        "<callback 'mine': <class 'plugins_for_tests.Plain'> kwargs=['greeting']>"
    )


def test_repr_of_a_named_callback_shows_the_name_as_written() -> None:
    entry = one("plugins_for_tests:Plain")
    assert repr(entry) == "<callback 'Plain': plugins_for_tests:Plain>"


def test_repr_of_an_instance_does_not_call_its_own() -> None:
    @dataclass
    class Holder:
        token: str

        def on_before_init(self, ctx: CallbackCtx) -> None:
            pass

    assert repr(one(Holder("s3cret"))) == "<callback 'Holder': instance of Holder>"


def test_a_class_defined_anew_under_the_same_name_is_another_callback() -> None:
    def define() -> type:
        class Redefined:
            def on_before_init(self, ctx: Any) -> None: ...

        return Redefined

    first, second = define(), define()
    assert CallbackEntry(first).key == CallbackEntry(first).key
    assert CallbackEntry(first).key != CallbackEntry(second).key


def test_a_callback_is_switched_off_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(DISABLE_VARIABLE, "a, ,c")
    stack = CallbackStack.parse([step("a"), step("b"), step("c")])
    with hook_log(caplog):
        assert [entry.name for entry in stack.for_deployment("app").entries] == ["b"]
    assert caplog.messages == [
        "callback 'a' is switched off by RAYSERVE_HOOKS_DISABLE",
        "callback 'c' is switched off by RAYSERVE_HOOKS_DISABLE",
    ]


def test_where_an_app_is_built_the_replicas_environment_counts() -> None:
    stack = CallbackStack.parse([step("a"), step("b")])
    found = stack.for_deployment("app", {DISABLE_VARIABLE: "a"})
    assert [entry.name for entry in found.entries] == ["b"]


def test_what_on_configure_left_makes_no_other_stack() -> None:
    stack = CallbackStack.parse(["lifecycle_callbacks:Plain"])
    configured = replace(stack, configured=Configured((), {"x": b""}, ("a",)))
    assert (configured, configured.key) == (stack, stack.key)
    sent = pickle.loads(pickle.dumps(configured.for_deployment("app")))
    assert sent.configured == configured.configured


@pytest.mark.parametrize(("names", "known"), [("ba", "a, b"), ("", "none")])
def test_an_unknown_name_to_switch_off(
    names: str, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DISABLE_VARIABLE, "zzz")
    text = (
        "RAYSERVE_HOOKS_DISABLE names 'zzz', which is no callback of this deployment; use names "
        f"of its callbacks (known: {known})"
    )
    with pytest.raises(CallbackConfigError, match=f"^{re.escape(text)}$"):
        CallbackStack.parse([step(name) for name in names]).for_deployment("app")


class Keeps:
    """Keeps its arguments as they come, and changes them."""

    def __init__(self, **kwargs: Any) -> None:
        self.kwargs = kwargs

    def on_before_init(self, ctx: CallbackCtx) -> None:
        self.kwargs["paths"].append("changed")
        self.kwargs["options"]["deep"].clear()


KWARGS = {"paths": ["a"], "options": {"deep": [1]}}


def keeps() -> dict[str, Any]:
    return {"callback": Keeps, "kwargs": copy.deepcopy(KWARGS)}


def test_a_stack_and_its_entries_are_frozen() -> None:
    stack = make_stack(keeps())
    with pytest.raises(dataclasses.FrozenInstanceError):
        stack.entries = ()  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        stack.time_limits.total = 1  # type: ignore[misc]
    for field in dataclasses.fields(CallbackEntry):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(stack.entries[0], field.name, None)


def test_what_becomes_of_the_input_later_does_not_reach_the_stack() -> None:
    item, limits = keeps(), {"total": 60}
    callbacks = [item]
    stack = CallbackStack.parse(callbacks, limits)
    key, pickled = stack.key, pickle.dumps(stack)
    item["kwargs"]["paths"].append("x")
    item["kwargs"]["options"]["deep"].append(2)
    item["kwargs"]["more"] = 1
    item["name"] = "other"
    limits["total"] = 1
    callbacks.clear()
    (entry,) = stack.entries
    assert (entry.name, entry.kwargs) == ("Keeps", KWARGS)
    assert stack.time_limits == TimeLimits(total=60)
    assert (stack.key, pickle.dumps(stack)) == (key, pickled)


def test_an_entry_made_by_hand_shares_nothing_either() -> None:
    kwargs = copy.deepcopy(KWARGS)
    entry = CallbackEntry(Keeps, kwargs)
    kwargs["paths"].append("x")  # type: ignore[attr-defined]
    assert entry.kwargs == KWARGS


def test_nothing_is_written_back_into_the_input() -> None:
    callbacks, limits = [keeps(), "plugins_for_tests:Plain"], {"total": 60}
    before = copy.deepcopy((callbacks, limits))
    stack = CallbackStack.parse(callbacks, limits).for_deployment("app")
    stack.build()
    stack.freeze(pickle.dumps)
    assert (callbacks, limits) == before


def test_a_callback_that_changes_its_arguments_does_not_change_the_stack() -> None:
    stack = make_stack(keeps())
    ((_, first),) = stack.build()
    first.on_before_init(None)  # type: ignore[attr-defined]
    assert stack.entries[0].kwargs == KWARGS
    ((_, second),) = stack.build()
    assert second.kwargs == KWARGS  # type: ignore[attr-defined]


def test_a_value_that_is_no_plain_container_is_handed_on_as_it_is() -> None:
    value = object()
    entry = one({"callback": Keeps, "kwargs": {"value": value}})
    plugin: Any = entry.create()
    assert plugin.kwargs["value"] is value


def test_the_stack_of_a_deployment_is_another_one() -> None:
    stack = CallbackStack.parse([Plain])
    named = stack.for_deployment("app")
    assert (named.deployment, stack.deployment) == ("app", "")
    assert named.entries == stack.entries
    assert named.key != stack.key


def test_all_that_cannot_travel_is_reported_together() -> None:
    def cannot(name: str) -> dict[str, object]:
        generator = (number for number in range(1))
        return {"callback": Plain, "name": name, "kwargs": {"greeting": generator}}

    with pytest.raises(CallbackConfigError, match=r"^2 problems:") as caught:
        CallbackStack.parse([cannot("a"), Plain, cannot("b")]).freeze(pickle.dumps)
    assert [problem.partition(" cannot")[0] for problem in caught.value.problems] == [
        "callback 'a'",
        "callback 'b'",
    ]


def test_what_is_wrong_with_list_limits_and_callbacks_is_reported_together() -> None:
    with pytest.raises(CallbackConfigError) as caught:
        CallbackStack.parse([None, "no_such_module:Other"], {"total": 0})
    assert [re.split("[;:] ", problem)[0] for problem in caught.value.problems] == [
        "callbacks[0] is None",
        "time_limits",
        "callback 'no_such_module:Other'",
    ]


def test_a_stack_travels_whole() -> None:
    stack = CallbackStack.parse([keeps()], {"total": 60}, on_error="warn").for_deployment("app")
    assert sent(stack) == stack
    assert sent(stack).key == stack.key


@pytest.mark.parametrize("error", EXITS)
def test_a_constructor_that_exits_is_named(error: type[BaseException]) -> None:
    class Exits:
        def __init__(self, token: str) -> None:
            raise error(f"out with {token}")

        def on_before_init(self, ctx: CallbackCtx) -> None:
            pass

    with pytest.raises(
        CallbackConfigError,
        match=rf"^callback 'Exits': exits where it is built: .*{error.__name__}: out with \*\*\*; "
        "raise an Exception there instead$",
    ):
        make_stack({"callback": Exits, "kwargs": {"token": "s3cr3t-value"}}).build()


@pytest.mark.parametrize(
    ("name", "already", "value"),
    [
        ("Plain", None, "Plain"),
        ("Plain", "", "Plain"),
        ("Plain", " Other ,", "Other,Plain"),
        ("my own", None, "'my own'"),
    ],
)
def test_the_way_to_start_without_a_callback(
    name: str, already: str | None, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [{"callback": Plain, "name": other} for other in ("Other", name)]
    stack = make_stack(*others)
    if already is None:
        monkeypatch.delenv(DISABLE_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(DISABLE_VARIABLE, already)
    text = f"set {DISABLE_VARIABLE}={value} to start once without it"
    assert stack.way_without(name) == text
    # It is true.
    (names,) = shlex.split(value)
    monkeypatch.setenv(DISABLE_VARIABLE, names)
    left = {entry.name for entry in stack.for_deployment("app").entries}
    assert left == {"Other", name} - set(names.split(","))


@pytest.mark.parametrize("name", ["a,b", " padded", "padded "])
def test_a_callback_that_the_variable_cannot_name_has_no_such_way(name: str) -> None:
    assert make_stack({"callback": Plain, "name": name}).way_without(name) == ""


@pytest.mark.parametrize("name", [None, "by_hand"])
def test_what_no_config_names_has_no_such_way(name: str | None) -> None:
    assert make_stack(Plain).way_without(name) == ""
