"""Callbacks that are configured as instances, and how they travel."""

import pickle
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from plugins_for_tests import Plain, make_ctx, one, refused, sent
from pydantic import BaseModel, ConfigDict, PrivateAttr

from rayserve_hooks.context import CallbackCtx


class Hook:
    """So that each class below is a callback."""

    __slots__ = ()

    def on_before_init(self, ctx: CallbackCtx) -> None:
        pass


class Holds(Hook):
    def __init__(self, held: object) -> None:
        self.size = 1
        self.held = held


class HoldsInSlot(Hook):
    __slots__ = ("held", "never_set", "size")

    def __init__(self, held: object) -> None:
        self.size = 1
        self.held = held


class HoldsInOneSlot(Hook):
    __slots__ = "held"  # noqa: PLC0205 - allowed by Python

    def __init__(self, held: object) -> None:
        self.held = held


class InheritsSlot(HoldsInSlot):
    """Has a ``__dict__`` beside the slots of its base."""

    def __init__(self, held: object) -> None:
        super().__init__(held)
        self.more = 2


class HoldsInPrivateSlot(Hook):
    __slots__ = ("__held",)

    def __init__(self, held: object) -> None:
        self.__held = held


@dataclass
class DataclassHolds(Hook):
    held: object


@dataclass(slots=True)
class SlottedDataclassHolds(Hook):
    held: object


@dataclass(frozen=True, slots=True)
class FrozenDataclassHolds(Hook):
    held: object


class ModelHolds(Hook, BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    held: object

    def __init__(self, held: object) -> None:
        super().__init__(held=held)


class ModelHoldsPrivately(Hook, BaseModel):
    _held: Any = PrivateAttr()

    def __init__(self, held: object) -> None:
        super().__init__()
        self._held = held


class LeavesOut(Hook):
    """Travels without its lock, and makes a new one there."""

    def __init__(self, bucket: str, more: object = None) -> None:
        self.bucket = bucket
        self.lock = threading.Lock()
        self.more = more

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.Lock())


class Refuses(Hook):
    def __reduce__(self) -> Any:
        raise RuntimeError("not me")


class Streaming:
    def __init__(self) -> None:
        self.stream: Any = None

    def on_before_init(self, ctx: CallbackCtx) -> None:
        self.stream = (number for number in range(1))


class FailsToLoad(Plain):
    def __setstate__(self, state: object) -> None:
        raise RuntimeError("no GPU here")


class Gone(Hook):
    """A class that the other process does not have."""


HOLDERS = [
    Holds,
    HoldsInSlot,
    HoldsInOneSlot,
    InheritsSlot,
    DataclassHolds,
    SlottedDataclassHolds,
    FrozenDataclassHolds,
    ModelHolds,
]
WAY_OUT = (
    "; name the class with kwargs and open such things in its hooks, or leave them out in "
    "__getstate__"
)


@pytest.fixture(params=["lock", "RLock", "socket", "TextIOWrapper", "generator"])
def held(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[object]:
    """What cannot be pickled, named by its kind."""
    if request.param == "socket":
        with socket.socket() as opened:
            yield opened
    elif request.param == "TextIOWrapper":
        with (tmp_path / "file").open("w") as file:
            yield file
    elif request.param == "generator":
        yield (number for number in range(1))
    else:
        yield threading.Lock() if request.param == "lock" else threading.RLock()


@pytest.mark.parametrize("make", [*HOLDERS, HoldsInPrivateSlot, ModelHoldsPrivately])
def test_an_instance_that_pickles_travels(make: Callable[[object], object]) -> None:
    instance = make({"a": [1]})
    entry = one(instance)
    entry.freeze(pickle.dumps)
    copy = sent(entry).create()
    assert type(copy) is make
    assert copy is not instance
    assert pickle.dumps(copy) == pickle.dumps(instance)


@pytest.mark.parametrize("make", HOLDERS)
def test_one_that_holds_what_cannot_travel_is_refused_with_its_name_and_a_way_out(
    make: Callable[[object], object], held: object
) -> None:
    name, kind = make.__name__, type(held).__name__
    with refused(
        f"callback {name!r} cannot be sent to another process: TypeError: its attribute 'held', a "
        f"{kind}: cannot pickle "
    ) as caught:
        one(make(held)).freeze(pickle.dumps)
    assert str(caught.value).endswith(WAY_OUT)


@pytest.mark.parametrize(
    ("make", "name"),
    [(HoldsInPrivateSlot, "_HoldsInPrivateSlot__held"), (ModelHoldsPrivately, "_held")],
)
def test_a_private_attribute_is_named_too(make: Callable[[object], object], name: str) -> None:
    with pytest.raises(ValueError, match=f"its attribute {name!r}, a lock: cannot pickle"):
        one(make(threading.Lock())).freeze(pickle.dumps)


def test_what_is_deep_in_an_attribute_names_the_attribute() -> None:
    text = "its attribute 'held', a dict: cannot pickle '_thread.lock' object"
    with pytest.raises(ValueError, match=re.escape(text)):
        one(Holds({"locks": [threading.Lock()]})).freeze(pickle.dumps)


def test_freeze_refuses_an_instance_that_holds_a_stream() -> None:
    instance = Streaming()
    instance.stream = (number for number in range(1))
    with refused(
        "callback 'Streaming' cannot be sent to another process: TypeError: its attribute "
        f"'stream', a generator: cannot pickle 'generator' object{WAY_OUT}"
    ):
        one(instance).freeze(pickle.dumps)


def test_one_that_leaves_out_what_cannot_travel_does() -> None:
    instance = LeavesOut("weights")
    entry = one(instance)
    with instance.lock:
        entry.freeze(pickle.dumps)
        copy: Any = sent(entry).create()
    assert copy.bucket == "weights"
    assert copy.lock.acquire(blocking=False)


def test_what_it_leaves_out_is_not_blamed_for_the_rest() -> None:
    with pytest.raises(ValueError, match="its attribute 'more', a generator: cannot pickle"):
        one(LeavesOut("weights", (number for number in range(1)))).freeze(pickle.dumps)


def test_one_that_refuses_by_itself_keeps_its_own_error() -> None:
    with refused(
        f"callback 'Refuses' cannot be sent to another process: RuntimeError: not me{WAY_OUT}"
    ) as caught:
        one(Refuses()).freeze(pickle.dumps)
    assert type(caught.value.__cause__) is RuntimeError


def test_an_instance_travels_as_it_was_configured() -> None:
    instance = Streaming()
    entry = one(instance)
    entry.freeze(pickle.dumps)
    instance.on_before_init(make_ctx())
    copy = sent(entry).create()
    assert isinstance(copy, Streaming)
    assert copy.stream is None
    assert entry.create() is instance


def test_what_runs_later_does_not_change_its_bytes() -> None:
    instance = Plain("as configured")
    entry = one(instance)
    entry.freeze(pickle.dumps)
    first = pickle.dumps(entry)
    instance.greeting = "changed"
    entry.freeze(pickle.dumps)
    assert pickle.dumps(entry) == first


def test_one_that_goes_on_from_another_process_is_what_arrived_there() -> None:
    entry = one(Plain("as configured"))
    entry.freeze(pickle.dumps)
    there = sent(entry)
    there.create().greeting = "changed there"  # type: ignore[attr-defined]
    assert sent(there).create().greeting == "as configured"  # type: ignore[attr-defined]


def test_one_that_was_not_frozen_is_pickled_when_it_is_sent() -> None:
    assert sent(one(Plain("mine"))).create().greeting == "mine"  # type: ignore[attr-defined]


def test_an_instance_that_cannot_be_built_again() -> None:
    text = (
        "callback 'FailsToLoad': the instance cannot be built again in this process: "
        "RuntimeError: no GPU here; name the class with kwargs instead"
    )
    with refused(text) as caught:
        sent(one(FailsToLoad())).create()
    assert type(caught.value.__cause__) is RuntimeError


def test_an_instance_whose_class_is_missing_there(monkeypatch: pytest.MonkeyPatch) -> None:
    there = sent(one(Gone()))
    monkeypatch.delattr(sys.modules[__name__], "Gone")
    with refused(
        "callback 'Gone': the instance cannot be built again in this process: AttributeError: "
        "Can't get attribute 'Gone' on "
    ) as caught:
        there.create()
    assert str(caught.value).endswith("; name the class with kwargs instead")


def test_an_instance_is_unpickled_once_in_a_process() -> None:
    copy = sent(one(Plain("mine")))
    assert copy.create() is copy.create()
