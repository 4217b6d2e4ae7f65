"""A class is looked at before anything of it is called."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from typing import Any

import pytest
from plugins_for_tests import Plain, one, refused

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.inspection import Unbuilt, hook_functions
from rayserve_hooks.core.stack import CallbackStack
from rayserve_hooks.errors import CallbackConfigError


class Watches(type):
    def __call__(cls, *args: object, **kwargs: object) -> Any:
        raise AssertionError(f"{cls.__name__} was called")


class NoHook(metaclass=Watches):
    pass


class Misspelt(metaclass=Watches):
    def on_befor_init(self, ctx: CallbackCtx) -> None: ...


class WrongSignature(metaclass=Watches):
    def on_before_init(self) -> None: ...


class NeedsSize:
    def __init__(self, size: int) -> None:
        raise AssertionError("it was called")

    def on_before_init(self, ctx: CallbackCtx) -> None: ...


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"callback": subprocess.Popen, "kwargs": {"args": "true"}}, "callback 'Popen': Popen has"),
        ({"callback": "subprocess:Popen", "kwargs": {"args": "x"}}, "callback 'Popen': Popen has"),
        (NoHook, "callback 'NoHook': NoHook has no hook; define at least one of"),
        (Misspelt, "callback 'Misspelt': method 'on_befor_init' is not a hook; did you mean"),
        (WrongSignature, "callback 'WrongSignature': on_before_init() has no parameter 'ctx'"),
        ({"callback": NeedsSize, "kwargs": {"sise": 1}}, "callback 'NeedsSize': "),
    ],
)
def test_what_cannot_be_a_callback_is_not_called(item: object, text: str) -> None:
    with refused(text):
        one(item).create()


def test_without_building_a_class_is_looked_at_and_its_arguments_are_compared() -> None:
    stack = CallbackStack.parse([{"callback": NeedsSize, "kwargs": {"size": 1}}, Plain("here")])
    (_, first), (_, second) = stack.build(construct=False)
    assert isinstance(first, Unbuilt)
    assert [hook.hook for hook in hook_functions(first)] == ["on_before_init"]
    assert isinstance(second, Plain)
    with refused("callback 'NeedsSize': test_looking.NeedsSize(size: 'int') lacks 'size'; add"):
        CallbackStack.parse([NeedsSize]).build(construct=False)


class SetsInConstructor:
    def __init__(self) -> None:
        self.on_before_init = lambda ctx: None


class SetsByName:
    def __init__(self) -> None:
        setattr(self, "on_before_init", lambda ctx: None)  # noqa: B010 - as it may be


class Slotted:
    __slots__ = ("on_before_init",)

    def __init__(self) -> None:
        self.on_before_init = lambda ctx: None


@dataclasses.dataclass
class Field:
    on_before_init: Any = None

    def __post_init__(self) -> None:
        self.on_before_init = lambda ctx: None


@pytest.mark.parametrize("cls", [SetsInConstructor, SetsByName, Slotted, Field])
def test_a_class_may_set_its_hooks_when_it_is_built(cls: type) -> None:
    assert [hook.hook for hook in hook_functions(one(cls).create())] == ["on_before_init"]


class SecretDefault:
    class Shows:
        def __repr__(self) -> str:
            raise AssertionError("its repr was asked for")

    def __init__(self, size: int, held: Any = Shows(), data: bytes = b"s3cret") -> None:  # noqa: B008
        ...

    def on_before_init(self, ctx: CallbackCtx) -> None: ...


def test_a_signature_shows_plain_defaults_only() -> None:
    text = (
        "callback 'SecretDefault': test_looking.SecretDefault(size: 'int', held: 'Any' = Ellipsis, "
        "data: 'bytes' = Ellipsis) lacks 'size'; add it, as in kwargs: {size: ...}"
    )
    with pytest.raises(CallbackConfigError, match=f"^{re.escape(text)}$"):
        one(SecretDefault).create()
