"""The secrets among values: found whatever class holds them, and none of it runs."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import threading
import time
import types
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pydantic
import pytest

from rayserve_hooks.core.known_secrets import secrets_among

S = "Zq8w9KdV-secret"
MODULE_TOKEN = S
STORES = {"password": S}


class OnClass:
    hf_token = S


class Inherits(OnClass):
    pass


class Nested:
    class Settings:
        api_key: ClassVar = S


class Slotted:
    __slots__ = ("password", "unset")

    def __init__(self) -> None:
        self.password = S


class MoreSlots(Slotted):
    __slots__ = ("other",)


class Private:
    __slots__ = ("__token",)

    def __init__(self) -> None:
        self.__token = S


class Attribute:
    def __init__(self) -> None:
        self.password = S


class Holds:
    def __init__(self, held: object, name: str = "held") -> None:
        vars(self)[name] = held


class Options(dict[str, object]):
    def __init__(self) -> None:
        self.api_key = S


class Pair(NamedTuple):
    user: str
    password: str


@dataclasses.dataclass(slots=True)
class Data:
    password: str = S


class Model(pydantic.BaseModel):
    password: str = S
    _token: str = pydantic.PrivateAttr("another-secret")


class Own(pydantic.SecretStr):
    def get_secret_value(self) -> str:
        raise AssertionError("it was called")


class OwnAccess(pydantic.SecretStr):
    def __getattribute__(self, name: str) -> Any:
        if name == "_secret_value":
            raise AssertionError("it was called")
        return super().__getattribute__(name)


def own_access() -> pydantic.SecretStr:
    made = pydantic.SecretStr(S)
    made.__class__ = OwnAccess
    return made


class Secrets(enum.Enum):
    HF_TOKEN = S


class Static:
    @staticmethod
    def on_before_init(ctx: object, token: str = S) -> None: ...


class KeywordOnly:
    def on_before_init(self, ctx: object, *, token: str = S) -> None: ...


class UsesConstant:
    def on_before_init(self, ctx: object) -> object:
        return MODULE_TOKEN


class UsesSettings:
    def on_before_init(self, ctx: object) -> object:
        return STORES["password"]


def closure() -> object:
    token = S

    class Closes:
        def on_before_init(self, ctx: object) -> object:
            return token

    return Closes()


def error() -> Exception:
    raised = ValueError("401")
    raised.response = {"headers": {"Authorization": S}}  # type: ignore[attr-defined]
    outer = RuntimeError("failed")
    outer.__cause__ = raised
    return outer


def module() -> types.ModuleType:
    made = types.ModuleType("settings")
    vars(made).update(HF_TOKEN=S)
    return made


HOLDERS = {
    "class attribute": OnClass(),
    "inherited": Inherits(),
    "class": OnClass,
    "class in a class": Nested(),
    "slots": Slotted(),
    "slots of a base": MoreSlots(),
    "private slot": Private(),
    "attribute": Attribute(),
    "object in an object": Holds(Holds(Holds(Holds(Attribute())))),
    "object that is secret": Holds(Holds(S), "credentials"),
    "list of objects": Holds([Holds([Attribute()])]),
    "attribute of a dict": Options(),
    "user dict": collections.UserDict({"password": S}),
    "chain map": collections.ChainMap({}, {"password": S}),
    "default dict": collections.defaultdict(str, password=S),
    "deque": collections.deque([{"password": S}]),
    "named tuple": Pair("me", S),
    "mapping proxy": types.MappingProxyType({"password": S}),
    "namespace": types.SimpleNamespace(password=S),
    "partial": functools.partial(print, token=S),
    "bound method": Holds(Attribute().__init__),  # type: ignore[misc]
    "dataclass with slots": Data(),
    "deep data": Holds(Holds([{"a": dataclasses.make_dataclass("D", ["b"])(Data())}])),
    "pydantic": Model(),
    "pydantic's secret": Holds(pydantic.SecretStr(S)),
    "secret of another class": Own(S),
    "secret with its own access": own_access(),
    "pydantic's secret of data": pydantic.Secret[dict[str, list[str]]]({"a": [S]}),
    "pydantic's secret bytes": {"a": pydantic.SecretBytes(S.encode())},
    "bytes": {"password": S.encode()},
    "bytearray": {"password": bytearray(S.encode())},
    "enum": Holds(Secrets.HF_TOKEN),
    "default": Static(),
    "keyword default": KeywordOnly(),
    "constant of the module": UsesConstant(),
    "settings of the module": UsesSettings(),
    "closure": closure(),
    "module": module(),
    "error": error(),
    "variable of a container": Holds([{"name": "HF_TOKEN", "value": S}]),
}


@pytest.mark.parametrize("value", HOLDERS.values(), ids=HOLDERS)
def test_a_secret_is_found_whatever_holds_it(value: object) -> None:
    assert S in list(secrets_among([value]))
    assert S in list(secrets_among([{"value": value}]))


def test_private_attributes_of_a_model_are_found() -> None:
    assert "another-secret" in list(secrets_among([Model()]))


class Auth(enum.Enum):
    SIMPLE = "simple-auth"


class Described(pydantic.BaseModel):
    hf_token: str = pydantic.Field("", description="of the hub")


class Client(Holds):
    """One of a library."""

    __module__ = "some_store.client"


HARMLESS = {
    "a choice": Holds(Auth.SIMPLE, "auth"),
    "a description of a field": Described(hf_token=""),
    "a dataclass's field": dataclasses.make_dataclass("D", [("hf_token", str, "")])(),
    "a path": Holds(Path("/run/secrets/hf"), "token_file"),
    "a number": Holds(1234567, "password"),
    "a module it uses": Holds(module()),
    "annotations": types.new_class("A", exec_body=lambda d: d.update(__doc__="hf_token: of it"))(),
    "a client's model of its service": Holds(Client(Client({"password": S}))),
}


def test_what_a_client_of_a_library_holds_is_found() -> None:
    assert S in list(secrets_among([Holds(Client({"password": S}))]))


@pytest.mark.parametrize("value", HARMLESS.values(), ids=HARMLESS)
def test_what_is_no_secret_of_it_is_not_taken_for_one(value: object) -> None:
    assert list(secrets_among([value])) == []


def refuses(*_: object, **__: object) -> Any:
    raise AssertionError("code of the value ran")


NAMES = (
    *("__getattribute__", "__getattr__", "__iter__", "__len__", "__str__", "__repr__", "__eq__"),
    *("__hash__", "__bool__", "__getitem__", "__contains__", "__bytes__", "__format__", "__call__"),
    *("items", "keys", "values", "decode", "get_secret_value", "strip", "encode"),
)


@pytest.mark.parametrize("base", [object, dict, list, str, bytes, set, tuple, Exception])
def test_no_code_of_a_value_runs(base: type) -> None:
    class Meta(type):
        __getattribute__ = refuses
        __instancecheck__ = refuses
        __subclasscheck__ = refuses

    body: dict[str, Any] = dict.fromkeys(NAMES, refuses)
    body["__class__"] = body["token"] = property(refuses)
    body["cached"] = functools.cached_property(refuses)
    body["password"] = S
    kind: Any = types.new_class("Kind", (base,), {"metaclass": Meta}, lambda d: d.update(body))
    value = base.__new__(kind)  # type: ignore[call-overload]
    name = "__hash__"  # of a key: Python itself calls it
    type.__setattr__(kind, name, lambda self: 1)
    for values in ([value], [{"value": [value]}], [{value: value}]):
        assert S in list(secrets_among(values))


def test_what_leads_back_to_itself_ends() -> None:
    loop = Holds(None)
    vars(loop).update(me=[loop], password=S)
    assert list(secrets_among([loop])) == [S]


def test_a_look_is_bounded() -> None:
    wide = Holds([Holds({"password": f"secret-number-{i}"}) for i in range(300_000)])
    started = time.process_time()
    assert S in list(secrets_among([wide, {"password": S}]))
    assert time.process_time() - started < 5


def test_what_another_thread_changes_meanwhile_is_read() -> None:
    changing: dict[str, object] = {"password": S}
    ended = threading.Event()

    def change() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            changing[f"a{number % 1000}"] = changing.pop(f"a{(number + 500) % 1000}", None)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(200):
            assert S in list(secrets_among([changing, Holds(changing)]))
    finally:
        ended.set()
        thread.join()
