"""Every text is pinned whole: it is what a user has to go by."""

from __future__ import annotations

import datetime as dt
import enum
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from rayserve_hooks.core.validation import Problem, problems_of, refused_call


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Size(enum.IntEnum):
    SMALL = 1
    BIG = 20


class Region(BaseModel):
    name: str
    zones: list[int] = []


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    hf_token: str = ""
    region: Region | None = None


class Plain:
    pass


class Options(TypedDict):
    size: int


Options.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]


@dataclass(config=ConfigDict(extra="forbid"))
class Point:
    x: int


def no_letters(value: str) -> str:
    if value.isalpha():
        raise ValueError(f"{value!r} has letters only; add a digit")
    if value == "123":
        raise AssertionError
    if value == "456":
        raise AssertionError("write another number than the example's")
    return value


def problems(hint: Any, value: object, **settings: Any) -> list[Problem]:
    """Validate ``{"it": value}``, as if ``it`` were the name of an argument."""
    given = {"it": value}
    adapter = TypeAdapter(dict[str, hint], config=ConfigDict(arbitrary_types_allowed=True))
    with pytest.raises(ValidationError) as caught:
        adapter.validate_python(given)
    return problems_of(caught.value, given, **settings)


@pytest.mark.parametrize(
    ("hint", "value", "text"),
    [
        (str, 7, "it=7): write a string"),
        (Annotated[int, Strict()], "7", "it='7'): write a whole number"),
        (int, "seven", "it='seven'): write a whole number"),
        (int, 1.5, "it=1.5): write a whole number"),
        (int, None, "it=None): write a whole number"),
        (Annotated[float, Strict()], True, "it=True): write a number"),
        (float, "x", "it='x'): write a number"),
        (Decimal, "x", "it='x'): write a number"),
        (Annotated[bool, Strict()], 1, "it=1): write true or false"),
        (bool, "maybe", "it='maybe'): write true or false"),
        (bytes, 7, "it=7): write bytes"),
        (None, 7, "it=7): write null"),
        (Path, 7, "it=7): write a path"),
        (list[str], 7, "it=7): write a list"),
        (list[str], "ab", "it='ab'): write a list, even of one item"),
        (Sequence[str], "ab", "it='ab'): write a list, even of one item"),
        (Sequence[str], 7, "it=7): write a list"),
        (tuple[str, ...], "ab", "it='ab'): write a list, even of one item"),
        (set[str], {"a": 1}, "it={'a': 1}): write a list"),
        (frozenset[str], 7, "it=7): write a list"),
        (dict[str, int], ["a"], "it=['a']): write a mapping"),
        (Mapping[str, int], ["a"], "it=['a']): write a mapping"),
        (Region, ["a"], "it=['a']): write a mapping"),
        (Point, ["a"], "it=['a']): write a mapping"),
        (Options, ["a"], "it=['a']): write a mapping"),
        (Literal["b", "a"], "c", "it='c'): use one of a, b"),
        (Literal["b or c", "it's, or", 'a"'], "c", "it='c'): use one of a\", b or c, it's, or"),
        (Literal[Color.RED, 1], "c", "it='c'): use one of 1, <Color.RED: 'red'>"),
        (Color, "green", "it='green'): use one of blue, red"),
        (Size, 7, "it=7): use one of 1, 20"),
        (Annotated[float, Field(gt=0)], 0, "it=0): write more than 0"),
        (Annotated[float, Field(gt=0.5)], 0, "it=0): write more than 0.5"),
        (Annotated[int, Field(ge=1)], 0, "it=0): write at least 1"),
        (Annotated[int, Field(lt=1)], 7, "it=7): write less than 1"),
        (Annotated[int, Field(le=1)], 7, "it=7): write at most 1"),
        (Annotated[int, Field(multiple_of=4)], 7, "it=7): write a multiple of 4"),
        (
            Annotated[float, Field(allow_inf_nan=False)],
            float("inf"),
            "it=inf): write a finite number",
        ),
        (Annotated[list[int], Field(min_length=2)], [7], "it=[7]): give at least 2 items"),
        (Annotated[list[int], Field(max_length=1)], [7, 8], "it=[7, 8]): give at most 1 item"),
        (Annotated[str, Field(min_length=1)], "", "it=''): write at least 1 character"),
        (Annotated[str, Field(max_length=2)], "abc", "it='abc'): write at most 2 characters"),
        (Annotated[str, Field(pattern="^a")], "b", "it='b'): write a string that matches '^a'"),
        (Callable[[], None], 7, "it=7): pass a function"),
        (Plain, 7, "it=7): pass an instance of Plain"),
        (type[Plain], int, "it=<type>): pass a subclass of Plain"),
        (Annotated[str, AfterValidator(no_letters)], "abc", "it=...): 'abc' has letters only; "),
        (Annotated[str, AfterValidator(no_letters)], "123", "it='123'): assertion failed"),
        (Annotated[str, AfterValidator(no_letters)], "456", "it='456'): write another number "),
        (
            dt.date,
            "soon",
            "it='soon'): input should be a valid date or datetime, input is too short",
        ),
    ],
)
def test_what_is_wrong_with_a_value(hint: Any, value: object, text: str) -> None:
    (problem,) = problems(hint, value)
    assert problem.in_call("X").startswith(f"X({text}")
    if not text.endswith((" ", "failed")):
        assert problem.in_call("X") == f"X({text}"


@pytest.mark.parametrize(
    ("hint", "value", "text"),
    [
        (list[dict[str, int]], [{}, {"CPU": "x"}], "it[1]['CPU']='x'): write a whole number"),
        (dict[int, list[str]], {3: [1]}, "it[3][0]=1): write a string"),
        (dict[float, str], {1.5: 1}, "it[1.5]=1): write a string"),
        (dict[Color, str], {Color.RED: 1}, "it[<Color.RED: 'red'>]=1): write a string"),
        (set[int], {"x"}, "it[0]='x'): write a whole number"),
        (Inner, {"region": {"zones": ["a"], "name": "b"}}, "it['region']['zones'][0]='a'): write"),
        (Inner, {"regoin": {}}, "it) has unknown key 'regoin'; drop it"),
        (Inner, {"region": {}}, "it['region']) has no key 'name'; add it"),
        (Inner, {1: 2}, "it) has unknown key 1; drop it"),
        (Options, {"size": 1, "color": 2}, "it) has unknown key 'color'; drop it"),
        (Point, {"x": 1, "y": 2}, "it) has unknown key 'y'; drop it"),
        (Point, {}, "it) has no key 'x'; add it"),
        (dict[str, int], {7: 1}, "it) has key 7; write a string"),
        (dict[Literal["a"], int], {"b": 1}, "it) has key 'b'; use one of a"),
        (Mapping[str, Mapping[str, int]], {"a": {None: 1}}, "it['a']) has key None; write a str"),
    ],
)
def test_where_it_is(hint: Any, value: object, text: str) -> None:
    (problem,) = problems(hint, value)
    assert problem.in_call("X").startswith(f"X({text}")


@pytest.mark.parametrize(
    ("hint", "value", "texts"),
    [
        (str | list[str], 7, ["it=7): write a string or a list"]),
        (int | list[str] | None, "x", ["it='x'): write a whole number or a list, even of one "]),
        (Literal["AUTO"] | int, "x", ["it='x'): use one of AUTO or write a whole number"]),
        (str | list[str], ["a", 7], ["it[1]=7): write a string"]),
        (str | dict[str, list[int]], {"a": ["b"]}, ["it['a'][0]='b'): write a whole number"]),
        (str | Path, 7, ["it=7): write a string or a path"]),
        (list[int | dict[str, int]], [{"a": "b"}, "c"], ["it[0]['a']='b'", "it[1]='c'"]),
        (str | Region, {}, ["it) has no key 'name'; add it"]),
        (Annotated[int, AfterValidator(abs)] | bytes, [], ["it=[]): write a whole number or byt"]),
        (int | Region | Point, {"name": 7}, ["it['name']=7): write", "it) has no", "it) has un"]),
    ],
)
def test_a_union_shows_none_of_pydantics_labels(hint: Any, value: object, texts: list[str]) -> None:
    found = [problem.in_call("X") for problem in problems(hint, value)]
    assert len(found) == len(texts), found
    for problem, text in zip(found, texts, strict=True):
        assert problem.startswith(f"X({text}")


class Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    callback: str
    kwargs: dict[str, Any] = {}
    on_error: Literal["raise", "warn"] | None = None

    @model_validator(mode="after")
    def _check(self) -> Entry:
        if self.callback == "module" and self.kwargs:
            raise ValueError("kwargs given for a module; drop them")
        return self


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        (
            {"callback": "a", "kwarg": {}},
            ["callbacks[0] has unknown key 'kwarg'; did you mean 'kwargs'?"],
        ),
        (
            {"callback": "a", "zzz": {}},
            ["callbacks[0] has unknown key 'zzz'; use one of callback, kwargs, on_error"],
        ),
        ({}, ["callbacks[0] has no key 'callback'; add it"]),
        (7, ["callbacks[0] is 7; write a mapping"]),
        (
            {"callback": 7, "kwargs": ["a"], "on_error": "ignore"},
            [
                "callbacks[0]: callback is 7; write a string",
                "callbacks[0]: kwargs is ['a']; write a mapping",
                "callbacks[0]: on_error is 'ignore'; use one of raise, warn",
            ],
        ),
        (
            {"callback": "a", "kwargs": {7: 1}},
            ["callbacks[0]: kwargs has key 7; write a string"],
        ),
        (
            {"callback": "module", "kwargs": {"a": 1}},
            ["callbacks[0]: kwargs given for a module; drop them"],
        ),
    ],
)
def test_an_entry_of_a_list(given: object, texts: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        Entry.model_validate(given)
    found = problems_of(caught.value, given, list(Entry.model_fields))
    assert [problem.in_config("callbacks[0]") for problem in found] == texts


class Store(BaseModel):
    """A callback of somebody else, who uses pydantic."""

    model_config = ConfigDict(extra="forbid")
    url: str
    api_key: str = Field(default="", min_length=8)
    options: Inner = Inner()

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        if not url.startswith("s3://"):
            raise ValueError(f"{url!r} is no store; write s3://bucket")
        return url


def refusal(known: Collection[str] = tuple(Store.model_fields), **kwargs: Any) -> tuple[str, ...]:
    with pytest.raises(ValidationError) as caught:
        Store(**kwargs)
    return refused_call("Store", caught.value, kwargs, known).problems


def test_all_problems_of_a_constructor_in_the_order_of_its_arguments() -> None:
    assert refusal(url="http://x", api_key=7, options={"region": {"zones": 1}}, optoins=1) == (
        "Store(url=...): 'http://x' is no store; write s3://bucket",
        "Store(api_key=***): write a string",
        "Store(options['region']) has no key 'name'; add it",
        "Store(options['region']['zones']=1): write a list",
        "Store has unknown argument 'optoins'; did you mean 'options'?",
    )


def test_a_missing_argument() -> None:
    assert refusal() == ("Store has no argument 'url'; add it",)


def test_an_unknown_argument_where_the_known_ones_are_not_told() -> None:
    assert refusal((), url="s3://x", zzz=1) == ("Store has unknown argument 'zzz'; drop it",)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"api_key": "s3cret"}, "Store(api_key=***): write at least 8 characters"),
        ({"options": {"hf_token": 12345}}, "Store(options['hf_token']=***): write a string"),
        ({"options": {"hf_token": ["s3cret"]}}, "Store(options['hf_token']=***): write a string"),
        ({"options": [{"password": "s3cret"}]}, "Store(options=[{'password': ***}]): write a map"),
        ({"url": "http://u:s3cret@h"}, "Store(url=...): 'http://***@h' is no store; write s3:/"),
        ({"url": "s3cret", "api_key": "s3cret"}, "Store(url='s3cret'): '***' is no store; write"),
    ],
)
def test_no_secret_is_shown(kwargs: dict[str, Any], text: str) -> None:
    found = refusal(**{"url": "s3://x", **kwargs})
    assert found[0].startswith(text)


def test_a_validators_text_on_a_secret_is_masked() -> None:
    class Login(BaseModel):
        password: Annotated[str, AfterValidator(no_letters)]

    given = {"password": "hunter"}
    with pytest.raises(ValidationError) as caught:
        Login(**given)
    found = refused_call("Login", caught.value, given)
    assert str(found) == "Login(password=***): '***' has letters only; add a digit"
    # Also where the error is about another input than the one at hand.
    found = refused_call("Login", caught.value, {})
    assert str(found) == "Login(password=***): '***' has letters only; add a digit"


def test_an_object_is_named_by_its_class_alone() -> None:
    class Client:
        def __repr__(self) -> str:
            return "Client(token='s3cret')"

    (problem,) = problems(str, Client())
    assert problem.in_call("X") == "X(it=<Client>): write a string"


def test_an_error_about_something_else_than_what_was_given() -> None:
    """As where a constructor validates a file it has read."""
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(dict[str, list[Region]]).validate_python({"a": [{"name": 7}]})
    found = refused_call("Store", caught.value, {"url": "s3://x"})
    assert str(found) == "Store(a[0]['name']=7): write a string"


def test_a_path_without_a_name() -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(list[int]).validate_python([1, "x"])
    (problem,) = problems_of(caught.value, [1, "x"])
    assert problem == Problem("[1]", "'x'", "write a whole number")


KINDS_OF_INPUT = [None, True, 7, 1.5, "x", b"x", [7], {"a": 7}, {7: "a"}, Plain(), Plain, "a" * 200]


@pytest.mark.parametrize("value", KINDS_OF_INPUT, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("hint", [int | Region, dict[int, Size] | Path, Store | Point, Color])
def test_nothing_of_pydantics_own_shows(hint: Any, value: object) -> None:
    try:
        TypeAdapter(dict[str, hint]).validate_python({"it": value})
    except ValidationError as error:
        for problem in problems_of(error, {"it": value}):
            text = problem.in_call("X")
            assert re.fullmatch(r"X\(it[^ ]*(=.*)?\)(:| has) .*[^.]", text)
            assert "pydantic" not in text
            assert "input should" not in text
            json.dumps([problem.path, problem.value, problem.text])
