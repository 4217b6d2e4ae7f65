"""Whatever is given for ``callbacks`` and ``time_limits`` ends in a stack or the config's error."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import sys
import time
import types
import typing
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any, Generic, TypeVar

import plugins_for_tests
import pytest
from plugins_for_tests import Outer, Plain, Strict, refused
from pydantic import BaseModel

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.limits import TimeLimits
from rayserve_hooks.core.manager import PluginManager
from rayserve_hooks.core.stack import CallbackEntry, CallbackStack
from rayserve_hooks.errors import CallbackConfigError
from rayserve_hooks.hookspecs import hookimpl

T = TypeVar("T")
BUDGET_S = 8  # of the fuzzing, which is cut off there on a slow machine


class Exits:
    def __init__(self, code: int = 0) -> None:
        sys.exit(code)

    def on_before_init(self, ctx: CallbackCtx) -> None: ...


class RaisesAnything(Exits):
    def __init__(self) -> None:
        raise GeneratorExit


class Box(Generic[T]):
    def on_before_init(self, ctx: CallbackCtx) -> None: ...


class Hostile:
    """Raises wherever it is looked at."""

    def _raise(self, *args: object) -> Any:
        raise RuntimeError("do not touch")

    __eq__ = __bool__ = __len__ = __iter__ = __getitem__ = __str__ = __repr__ = __format__ = _raise
    __call__ = keys = items = __getattr__ = __contains__ = __dir__ = _raise
    __hash__ = object.__hash__
    __class__ = property(_raise)


class HostileMapping(Mapping[Any, Any]):
    def __getitem__(self, key: object) -> object:
        raise RuntimeError("do not touch")

    def __iter__(self) -> Iterator[object]:
        raise RuntimeError("do not touch")

    def __len__(self) -> int:
        return 1


class Lazy(types.ModuleType):
    def __dir__(self) -> list[Any]:
        raise RuntimeError("nothing to list")

    def __getattr__(self, name: str) -> Any:
        raise ImportError(f"no {name} without torch")


class HookIsAProperty:
    @property
    def on_before_init(self) -> object:
        raise AssertionError("it ran")


class Model(BaseModel):
    size: int

    def on_before_init(self, ctx: CallbackCtx) -> None: ...


@dataclasses.dataclass
class Secret:
    value: str = "s3cret-repr"

    def __repr__(self) -> str:
        raise AssertionError("its repr was asked for")


def circular() -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["again"] = [made]
    return made


def deep(levels: int = 100_000) -> Any:
    made: Any = "end"
    for _ in range(levels):
        made = [made]
    return made


@pytest.fixture(autouse=True)
def _lazy_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lazy_for_tests", Lazy("lazy_for_tests"))


CASES: list[tuple[object, str]] = [
    ({"callback": Exits}, "callback 'Exits': .* exits where it is built: SystemExit: 0; raise"),
    (RaisesAnything, "callback 'RaisesAnything': .* exits where it is built: GeneratorExit; raise"),
    (Box[int], "callbacks[0] is a parametrized Box, which is no class; write Box itself"),
    (list[int], "callbacks[0] is a parametrized list, which is no class; write list itself"),
    (int | str, "callbacks[0] is a UnionType; write a string such as"),
    (typing.Optional[int], "callbacks[0] is a _UnionGenericAlias; write a string such as"),  # noqa: UP045
    (Plain.on_before_init, "callbacks[0] is a function; write a string such as"),
    (Plain().on_before_init, "callbacks[0] is a method; write a string such as"),
    (functools.partial(Plain), "callbacks[0] is a partial; write a string such as"),
    (b"\x00", "callbacks[0] is a bytes; write a string such as"),
    (range(10**9), "callbacks[0] is a range; write a string such as"),
    ({Plain}, "callbacks[0] is [<type>]; write a string such as"),
    (Hostile(), "callback 'Hostile': Hostile has no hook; define at least one of"),
    (HostileMapping(), "callbacks[0] cannot be read: RuntimeError: do not touch"),
    (HookIsAProperty, "callback 'HookIsAProperty': 'on_before_init' is named after a hook, but is"),
    ("__main__:X", "callback '__main__:X': in every other process '__main__' is another module;"),
    ("__main__.X", "callback '__main__.X': in every other process '__main__' is another module;"),
    ("__main__", "callback '__main__': in every other process '__main__' is another module;"),
    ("lazy_for_tests:X", "callback 'lazy_for_tests:X': reading 'X' failed: ImportError: no X"),
    ("lazy_for_tests.X", "callback 'lazy_for_tests.X': reading 'X' failed: ImportError: no X"),
    (
        "rayserve_hooks:LLMConfi",
        "callback 'rayserve_hooks:LLMConfi': module 'rayserve_hooks' has no 'LLMConfi'; did you",
    ),
    (sys.modules["rayserve_hooks"], "callback 'rayserve_hooks': module has no hook; "),
    ("subprocess:Popen", "callback 'Popen': Popen has no hook; define at least one of"),
    ("os:system", "callback 'system': builtin_function_or_method has no hook; define"),
    (
        {"callback": Plain, "kwargs": {1: "a", "b": 2}},
        "callbacks[0]: kwargs has key 1; write a string",
    ),
    (
        {"callback": Plain, "kwargs": {"greeting": circular()}},
        "callback 'Plain': kwargs hold themselves, or are nested too deep; give plain values",
    ),
    (
        {"callback": Plain, "kwargs": {"greeting": deep()}},
        "callback 'Plain': kwargs hold themselves, or are nested too deep; give plain values",
    ),
    (Model, "callback 'Model': Model has no argument 'size'; add it"),
    (
        {"callback": Model, "kwargs": {"size": Secret()}},
        "callback 'Model': Model(size=<Secret>): write a whole number",
    ),
    (
        {"callback": "download_policy", "kwargs": {"local": Secret()}},
        "callback 'download_policy': DownloadPolicy(local=<Secret>): a Secret is not a download",
    ),
    (
        {"callback": "download_policy", "kwargs": {"local": b"s3cret"}},
        "callback 'download_policy': DownloadPolicy(local=<bytes>): a bytes is not a download",
    ),
    ({"callback": Plain, "name": Secret()}, "callbacks[0]: name is a Secret; write a string"),
    ({"callback": Plain, "name": b"s3cret"}, "callbacks[0]: name is a bytes; write a string"),
    ({"callback": Plain, "on_error": Secret()}, "callbacks[0]: on_error is <Secret>; use one of"),
    (
        {"callback": Secret(), "only_on_cluster": Secret()},
        "callbacks[0]: only_on_cluster is a Secret for callback a Secret; write true, and name",
    ),
    ({"callback": Plain, "kwargs": Secret()}, "callbacks[0]: kwargs is Secret; write a mapping"),
    ({b"callback": Plain}, "callbacks[0] "),
]


@pytest.mark.parametrize(("item", "text"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_what_cannot_be_a_callback_says_so(item: object, text: str) -> None:
    start, _, rest = text.partition(".*")
    with refused(start) as caught:
        CallbackStack.parse([item]).build()
    assert rest in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (Secret(), "time_limits is <Secret>; write a mapping from"),
        (b"60", "time_limits is <bytes>; write a mapping from"),
        ({Secret: 1}, "time_limits has unknown key '<type>'; use one of"),
        ({"total": Secret()}, "time_limits: total is <Secret>; write seconds, more than 0, or"),
        ({"total": float("inf")}, "time_limits: total is inf; write seconds, more than 0, or"),
        ({"total": float("nan")}, "time_limits: total is nan; write seconds, more than 0, or"),
        ({"total": 10**400}, "time_limits: total is "),
        ({"total": True}, "time_limits: total is True; write seconds"),
        (HostileMapping(), "time_limits cannot be read: RuntimeError: do not touch"),
        (circular(), "time_limits has unknown key 'again'; use one of"),
    ],
)
def test_what_cannot_be_limits_says_so(limits: object, text: str) -> None:
    with refused(text):
        CallbackStack.parse([], limits)
    assert TimeLimits.parse({"total": 5}).total == 5


def test_an_entry_by_hand_is_checked_as_well() -> None:
    with refused("callback 'Plain': kwargs is no mapping with strings as keys; write one of"):
        CallbackEntry(Plain, {1: 2})  # type: ignore[dict-item]


WORDS = ["callback", "kwargs", "name", "on_error", "only_on_cluster", "greeting", "total", "limit"]
NAMES = [
    *("plugins_for_tests:Plain", "plugins_for_tests.Outer", "plugins_for_tests", "download_policy"),
    *("json:", ":x", "", ".", "..", "a..b", "json.decoder", "lazy_for_tests:X", "\ud800", "\0"),
    *("__main__:X", "subprocess:Popen", "os:system", "test_any_input:Exits", "warn", "raise"),
    *("test_any_input:HookIsAProperty", "test_any_input:Model", "rayserve_hooks:x", "json:tool.x"),
]
OBJECTS: list[Any] = [
    *(item for item, _ in CASES),
    *(Plain, Strict, Outer.Inner, Exits, Box, Model, Plain(), plugins_for_tests),
    *(Hostile(), HostileMapping(), Secret(), object(), hookimpl, T, circular, *WORDS),
]
PLAIN: list[Any] = [None, True, 0, -1, 10**30, 1.5, float("nan"), "", "a", "\udcff", b"x", 1j, ()]


# Not by Hypothesis, which asks what it generates for its repr.
def shape(random: Random, depth: int = 0) -> Any:
    """Return a value of any shape, often nearly right."""

    def inner() -> Any:
        return shape(random, depth + 1)

    def key() -> Any:
        return random.choice([*WORDS, *WORDS, *PLAIN])

    kind = random.random() + depth * 0.2
    size = range(random.randrange(4))
    if kind < 0.3:
        return [inner() for _ in size]
    if kind < 0.4:
        inside = [inner() for _ in size]
        return random.choice([tuple(inside), inside, iter(inside)])
    if kind < 0.6:
        return {"callback": inner(), **{random.choice(WORDS): inner() for _ in size}}
    if kind < 0.75:
        return {key(): inner() for _ in size}
    return random.choice(random.choice([NAMES, OBJECTS, OBJECTS, PLAIN]))


def what_is_wrong(callbacks: object, limits: object) -> str:
    try:
        stack = CallbackStack.parse(callbacks, limits)
        PluginManager(stack.here())
        stack.freeze(pickle.dumps)
    except CallbackConfigError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_any_shape_ends_in_a_manager_or_in_the_documented_error() -> None:
    random, until = Random(12), time.monotonic() + BUDGET_S
    for _ in range(5000):
        callbacks, limits = shape(random), random.choice([None, None, shape(random)])
        if time.monotonic() > until:
            return
        text = what_is_wrong(callbacks, limits)
        assert "s3cret" not in text
