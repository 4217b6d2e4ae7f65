"""Every text is pinned whole: it is what a user has to go by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    create_model,
)

from rayserve_hooks.core.validation import Problem, problems_of


def no_letters(value: str) -> str:
    if value.isalpha():
        raise ValueError(f"{value!r} has letters only; add a digit")
    return value


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    hf_token: str = ""
    sizes: list[int] = []


def problems(hint: Any, value: object) -> list[Problem]:
    model = create_model("Model", it=(hint, ...))
    with pytest.raises(ValidationError) as caught:
        model(it=value)
    return list(problems_of(caught.value, ["it"]))


@pytest.mark.parametrize(
    ("hint", "value", "text"),
    [
        (str, 7, "it=7): write a string"),
        (Annotated[int, Strict()], "7", "it='7'): write a whole number"),
        (int, "seven", "it='seven'): write a whole number"),
        (int, None, "it=None): write a whole number"),
        (Annotated[float, Strict()], True, "it=True): write a number"),
        (float, "x", "it='x'): write a number"),
        (bool, "maybe", "it='maybe'): write true or false"),
        (Path, 7, "it=7): write a path"),
        (list[str], 7, "it=7): write a list"),
        (list[str], "ab", "it='ab'): write a list, even of one item"),
        (Sequence[str], "ab", "it='ab'): write a list, even of one item"),
        (Sequence[str], 7, "it=7): write a list"),
        (tuple[str, ...], 7, "it=7): write a list"),
        (dict[str, int], ["a"], "it=['a']): write a mapping"),
        (Mapping[str, int], ["a"], "it=['a']): write a mapping"),
        (Literal["b", "a"], "c", "it='c'): use one of a, b"),
        (Annotated[float, Field(gt=0)], 0, "it=0): write more than 0"),
        (Annotated[int, Field(ge=1)], 0, "it=0): write at least 1"),
        (Annotated[int, Field(lt=1)], 7, "it=7): write less than 1"),
        (Annotated[int, Field(le=1)], 7, "it=7): write at most 1"),
        (Annotated[list[int], Field(min_length=2)], [7], "it=[7]): give at least 2 items"),
        (
            Annotated[str, AfterValidator(no_letters)],
            "ab",
            "it=...): 'ab' has letters only; add a digit",
        ),
        (Annotated[str, Field(pattern="^a")], "b", "it='b'): string should match pattern '^a'"),
        (list[dict[str, int]], [{}, {"CPU": "x"}], "it[1]['CPU']='x'): write a whole number"),
        (Inner, {"sizes": ["a"]}, "it['sizes'][0]='a'): write a whole number"),
        (Inner, {"siezs": []}, "it) has unknown key 'siezs'; use one of it"),
        (dict[str, int], {7: 1}, "it) has key 7; write a string"),
        (Inner, {"hf_token": 12345}, "it['hf_token']=***): write a string"),
    ],
)
def test_what_is_wrong_with_a_value(hint: Any, value: object, text: str) -> None:
    (problem,) = problems(hint, value)
    assert problem.in_call("X") == f"X({text}"


def test_a_missing_name() -> None:
    with pytest.raises(ValidationError) as caught:
        create_model("Model", it=(int, ...))()
    (problem,) = problems_of(caught.value, ["it"], noun="argument")
    assert problem.in_call("X") == "X has no argument 'it'; add it"
    assert problem.in_config("callbacks[0]") == "callbacks[0] has no argument 'it'; add it"


@pytest.mark.parametrize(
    ("known", "text"),
    [
        (["hf_token", "sizes"], "has unknown key 'size'; did you mean 'sizes'?"),
        (["url"], "has unknown key 'size'; use one of url"),
        ([], "has unknown key 'size'; drop it"),
    ],
)
def test_an_unknown_name(known: list[str], text: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Inner(size=[])  # type: ignore[call-arg]
    (problem,) = problems_of(caught.value, known)
    assert problem.in_config("here") == f"here {text}"


def test_in_a_config_the_value_is_named_first() -> None:
    (problem,) = problems(str, 7)
    assert problem.in_config("callbacks[0]") == "callbacks[0]: it is 7; write a string"


def test_a_validators_text_on_a_secret_is_masked() -> None:
    model = create_model("Model", password=(Annotated[str, AfterValidator(no_letters)], ...))
    with pytest.raises(ValidationError) as caught:
        model(password="hunter")
    (problem,) = problems_of(caught.value, ["password"])
    assert problem.in_call("Login") == "Login(password=***): '***' has letters only; add a digit"


def test_an_object_is_named_by_its_class_alone() -> None:
    class Client:
        def __repr__(self) -> str:
            return "Client(token='s3cret')"

    (problem,) = problems(str, Client())
    assert problem.in_call("X") == "X(it=<Client>): write a string"
