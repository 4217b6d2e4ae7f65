from __future__ import annotations

import doctest
import enum
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

import pytest
from pydantic import BaseModel, Field, Strict, ValidationError

from rayserve_hooks.core import arguments
from rayserve_hooks.core.arguments import checked_arguments
from rayserve_hooks.errors import CallbackConfigError

if TYPE_CHECKING:
    from decimal import Decimal

T = TypeVar("T")


class Color(enum.Enum):
    RED = "red"


class Client:
    pass


class Limits(BaseModel):
    size: int


class Everything:
    @checked_arguments
    def __init__(  # type: ignore[no-untyped-def]  # noqa: PLR0917 - one of every type
        self,
        whole: int = 0,
        number: float = 0.0,
        text: str = "",
        switch: bool = False,
        data: bytes = b"",
        texts: Sequence[str] = (),
        pair: tuple[int, int] = (0, 0),
        names: frozenset[str] = frozenset(),
        amounts: Mapping[str, float | None] | None = None,
        path: Path | None = None,
        text_or_path: str | os.PathLike[str] = "",
        color: Color = Color.RED,
        kind: Literal["a", "b"] = "a",
        call: Callable[[int], None] | None = None,
        client: Client | None = None,
        limits: Limits | None = None,
        nested: list[dict[int, list[bool]]] | None = None,
        positive: Annotated[int, Field(gt=0)] = 1,
        lax: Annotated[int, Strict(False)] = 1,
        anything: Any = None,
        cls: type[int] = int,
        unannotated=None,
    ) -> None:
        self.given = dict(locals())


CLIENT = Client()


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("whole", 7, 7),
        ("number", 7, 7.0),
        ("texts", ["a"], ["a"]),
        ("texts", ("a",), ("a",)),
        ("pair", [1, 2], (1, 2)),
        ("names", ["a", "a"], frozenset("a")),
        ("amounts", {"CPU": 1, "GPU": None}, {"CPU": 1.0, "GPU": None}),
        ("path", "/models", Path("/models")),
        ("text_or_path", "/models", "/models"),
        ("text_or_path", Path("/models"), Path("/models")),
        ("color", "red", Color.RED),
        ("color", Color.RED, Color.RED),
        ("call", print, print),
        ("client", CLIENT, CLIENT),
        ("limits", {"size": 1}, Limits(size=1)),
        ("nested", [{1: [True]}], [{1: [True]}]),
        ("lax", "7", 7),
        ("anything", CLIENT, CLIENT),
        ("cls", bool, bool),
        ("unannotated", CLIENT, CLIENT),
    ],
)
def test_what_is_accepted(name: str, value: Any, kept: object) -> None:
    given = Everything(**{name: value}).given[name]
    assert (type(given), given) == (type(kept), kept)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("whole", "7", "(whole='7'): write a whole number"),
        ("whole", 7.0, "(whole=7.0): write a whole number"),
        ("whole", True, "(whole=True): write a whole number"),
        ("number", "7", "(number='7'): write a number"),
        ("number", True, "(number=True): write a number"),
        ("text", 7, "(text=7): write a string"),
        ("text", b"7", "(text=<bytes>): write a string"),
        ("switch", 1, "(switch=1): write true or false"),
        ("switch", "yes", "(switch='yes'): write true or false"),
        ("data", "x", "(data='x'): write bytes"),
        ("texts", "ab", "(texts='ab'): write a list, even of one item"),
        ("texts", ["a", None], "(texts[1]=None): write a string"),
        ("pair", [1], "(pair) has no key 1; add it"),
        ("pair", ["1", 2], "(pair[0]='1'): write a whole number"),
        ("names", "ab", "(names='ab'): write a list, even of one item"),
        ("amounts", {"CPU": "1"}, "(amounts['CPU']='1'): write a number"),
        ("amounts", ["CPU"], "(amounts=['CPU']): write a mapping"),
        ("amounts", {7: 1}, "(amounts) has key 7; write a string"),
        ("path", 7, "(path=7): write a path"),
        ("text_or_path", 7, "(text_or_path=7): write a string or a path"),
        ("color", "green", "(color='green'): use one of red"),
        ("kind", "c", "(kind='c'): use one of a, b"),
        ("call", "print", "(call='print'): pass a function"),
        ("client", {}, "(client={}): pass an instance of Client"),
        ("limits", {}, "(limits) has no key 'size'; add it"),
        ("nested", [{1: ["yes"]}], "(nested[0][1][0]='yes'): write true or false"),
        ("positive", 0, "(positive=0): write more than 0"),
        ("positive", "1", "(positive='1'): write a whole number"),
        ("cls", str, "(cls=<type>): pass a subclass of int"),
        ("whol", 7, " has unknown argument 'whol'; did you mean 'whole'?"),
    ],
)
def test_what_is_refused(name: str, value: Any, text: str) -> None:
    with pytest.raises(CallbackConfigError) as caught:
        Everything(**{name: value})
    assert str(caught.value) == f"Everything{text}"
    assert caught.value.__suppress_context__


class Kinds:
    @checked_arguments
    def __init__(self, a: int, /, b: int, *more: int, c: int, d: int = 4, **others: int) -> None:
        self.given = (a, b, more, c, d, others)


def test_every_kind_of_parameter() -> None:
    assert Kinds(1, 2, 3, c=5, x=6).given == (1, 2, (3,), 5, 4, {"x": 6})
    assert Kinds(1, b=2, c=5).given == (1, 2, (), 5, 4, {})


def test_all_problems_together_by_the_names_of_the_arguments() -> None:
    with pytest.raises(CallbackConfigError, match=r"^5 problems:") as caught:
        Kinds("a", "b", 3, "c", x="d")  # type: ignore[call-arg, arg-type]
    assert caught.value.problems == (
        "Kinds(a='a'): write a whole number",
        "Kinds(b='b'): write a whole number",
        "Kinds(more[1]='c'): write a whole number",
        "Kinds(x='d'): write a whole number",
        "Kinds has no argument 'c'; add it",
    )


class Warmup:
    @checked_arguments
    def __init__(self, prompts: Sequence[str], rounds: int = 1) -> None:
        self.prompts = prompts
        self.rounds = rounds


class Nothing:
    @checked_arguments
    def __init__(self) -> None:
        self.built = True


@pytest.mark.parametrize(
    ("cls", "args", "kwargs", "text"),
    [
        (Warmup, (), {}, " has no argument 'prompts'; add it"),
        (Warmup, ([], 1, 2, 3), {}, " takes at most 2 positional arguments; drop the rest"),
        (
            Warmup,
            ([],),
            {"prompts": []},
            "(prompts=[]): given by position and by name; keep one of them",
        ),
        (
            Warmup,
            ([],),
            {"zzz": 1},
            " has unknown argument 'zzz'; use one of prompts, rounds",
        ),
        (Nothing, (1,), {}, " takes no positional arguments; drop the rest"),
        (Nothing, (), {"x": 1}, " has unknown argument 'x'; drop it"),
    ],
)
def test_arguments_that_do_not_fit_the_signature(
    cls: Any, args: Any, kwargs: dict[str, Any], text: str
) -> None:
    with pytest.raises(CallbackConfigError) as caught:
        cls(*args, **kwargs)
    assert str(caught.value) == f"{cls.__name__}{text}"
    assert Nothing().built


def test_signature_name_and_docstring_stay() -> None:
    assert (
        str(inspect.signature(Warmup)) == "(prompts: 'Sequence[str]', rounds: 'int' = 1) -> 'None'"
    )
    assert Warmup.__init__.__qualname__ == "Warmup.__init__"


def test_the_type_checker_still_sees_the_arguments() -> None:
    """``warn_unused_ignores`` makes an error of an ignore that ignores nothing."""
    with pytest.raises(CallbackConfigError, match="write a whole number"):
        Warmup([], rounds="2")  # type: ignore[arg-type]
    with pytest.raises(CallbackConfigError, match="did you mean 'rounds'"):
        Warmup([], round=2)  # type: ignore[call-arg]


class Inherits(Warmup):
    pass


class Calls(Warmup):
    def __init__(self, rounds: Any) -> None:
        super().__init__([], rounds)


def test_the_message_names_the_class_whose_arguments_they_are() -> None:
    with pytest.raises(CallbackConfigError, match=r"^Inherits\(rounds='2'\): write a whole number"):
        Inherits([], rounds="2")  # type: ignore[arg-type]
    with pytest.raises(CallbackConfigError, match=r"^Warmup\(rounds='2'\): write a whole number"):
        Calls("2")


class Generics(Generic[T]):
    @checked_arguments
    def __init__(self, values: list[T]) -> None:
        self.values = values


def test_a_generic_class() -> None:
    assert Generics(["a"]).values == ["a"]


class Refuses:
    @checked_arguments
    def __init__(self, size: object = 1) -> None:
        Limits(size=size)  # type: ignore[arg-type]


def test_a_validation_error_of_the_body_is_none_of_the_arguments() -> None:
    with pytest.raises(ValidationError, match="Limits"):
        Refuses("x")


class Unreadable:
    @checked_arguments
    def __init__(self, price: Decimal) -> None:
        self.price = price


def test_an_annotation_that_cannot_be_read() -> None:
    with pytest.raises(
        TypeError,
        match=r"^the arguments of Unreadable.__init__\(\) cannot be checked: name 'Decimal' is not "
        r"defined; define or import the name in module 'test_arguments', and not under "
        "TYPE_CHECKING alone$",
    ):
        Unreadable(1)  # type: ignore[arg-type]


def test_secrets_are_masked() -> None:
    class Login:
        @checked_arguments
        def __init__(self, hf_token: str, env: Mapping[str, Mapping[str, int]]) -> None: ...

    with pytest.raises(CallbackConfigError) as caught:
        Login(12345, {"a": {"api_key": "s3cret"}, "b": {"password": [1]}})  # type: ignore[dict-item, arg-type]
    assert caught.value.problems == (
        "Login(hf_token=***): write a string",
        "Login(env['a']['api_key']=***): write a whole number",
        "Login(env['b']['password']=***): write a whole number",
    )


def test_one_class_built_in_many_threads() -> None:
    class Callback:
        @checked_arguments
        def __init__(self, size: Annotated[int, Field(gt=0)]) -> None:
            self.size = size

    sizes: list[int] = []
    threads = [threading.Thread(target=lambda: sizes.append(Callback(3).size)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [3] * 8


def test_a_class_of_a_notebook_travels_after_its_first_use() -> None:
    """Such a class is pickled by value, its methods' closures included."""
    cloudpickle = pytest.importorskip("cloudpickle")
    program = (
        "import sys, pickle\n"
        "Callback = pickle.load(sys.stdin.buffer)\n"
        "assert Callback(3).size == 3\n"
        "try: Callback('3')\n"
        "except ValueError as error: print(error)\n"
    )

    class Callback:
        @checked_arguments
        def __init__(self, size: int) -> None:
            self.size = size

    Callback(1)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        data = cloudpickle.dumps(Callback)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    answer = subprocess.run(
        [sys.executable, "-c", program], input=data, capture_output=True, check=True
    )
    assert answer.stdout.decode() == "Callback(size='3'): write a whole number\n"


@pytest.mark.parametrize(
    "name",
    ["custom_initialization", "custom_placement_group", "download_policy", "startup_metrics"],
)
def test_importing_a_callback_builds_no_schema(name: str) -> None:
    program = (
        f"import sys, rayserve_hooks.impls.{name}\n"
        "assert 'pydantic._internal._generate_schema' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_example_of_the_docstring() -> None:
    names = {"Sequence": Sequence, "checked_arguments": checked_arguments}
    (example,) = doctest.DocTestFinder().find(checked_arguments, globs={**vars(arguments), **names})
    result = doctest.DocTestRunner().run(example)
    assert (result.attempted, result.failed) == (2, 0)
