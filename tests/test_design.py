"""The specification names what there is: fields, hooks, limits, phases, files, functions."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.hooks import FIRST_RESULT, HOOKS
from rayserve_hooks.core.limits import TimeLimits
from rayserve_hooks.core.stack import CallbackEntry
from rayserve_hooks.errors import Phase

PACKAGE = Path(__file__).parent.parent / "rayserve_hooks"
DESIGN = (PACKAGE.parent / "docs" / "design.md").read_text()
FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
FUNCTION = re.compile(r"`([\w/]+\.py): ([\w.]+)`")


def below(mark: str) -> str:
    """Return what stands between a mark and the next heading."""
    _, found, text = DESIGN.partition(f"<!-- {mark} -->\n")
    assert found, mark
    return text.partition("\n#")[0]


def table(name: str) -> list[list[str]]:
    lines = below(f"table: {name}").partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]


def test_the_table_of_fields_is_the_contexts() -> None:
    members = {name: value for name, value in vars(CallbackCtx).items() if name[0] != "_"}
    read_only = [name for name, value in members.items() if isinstance(value, property)]
    read_write = [
        name
        for name, value in members.items()
        if hasattr(value, "__set__") and name not in read_only
    ]
    assert [(name, access) for name, access, _ in table("fields")] == [
        *((name, "read/write") for name in read_write),
        *((name, "read-only") for name in read_only),
    ]


def test_the_table_of_hooks_is_the_contract() -> None:
    rows = table("hooks")
    assert tuple(row[0] for row in rows) == HOOKS
    for name, _, _, result in rows:
        assert ("first result wins" in result) == (name in FIRST_RESULT), name
        assert ("all run" in result) == (name not in FIRST_RESULT), name


def test_the_table_of_keys_is_an_entrys() -> None:
    fields = [field.name for field in dataclasses.fields(CallbackEntry) if field.init]
    assert [row[0] for row in table("keys")] == fields


def test_the_table_of_limits_has_their_defaults() -> None:
    written = {name: None if text == "none" else float(text) for name, text, _ in table("limits")}
    assert written == dataclasses.asdict(TimeLimits())


def test_the_table_of_phases_is_in_order() -> None:
    assert [row[0] for row in table("phases")] == list(Phase)


def test_each_file_is_named_once() -> None:
    named = re.findall(r"^- `([\w/.]+)`: \S", below("list: files"), re.MULTILINE)
    assert sorted(named) == FILES


@pytest.mark.parametrize("walk", ["walk: name", "walk: ctx"])
def test_a_walk_names_functions(walk: str) -> None:
    steps = re.split(r"^\d+\. ", below(walk), flags=re.MULTILINE)[1:]
    assert len(steps) > 5
    assert len(set(FUNCTION.findall(below(walk)))) > len(steps)


@pytest.mark.parametrize(("file", "path"), sorted(set(FUNCTION.findall(DESIGN))))
def test_a_function_is_where_it_is_said_to_be(file: str, path: str) -> None:
    # Read and not imported: some files import Ray, which takes seconds.
    scope: ast.Module | ast.ClassDef = ast.parse((PACKAGE / file).read_text())
    *classes, last = path.split(".")
    for name in classes:
        scope = next(x for x in scope.body if isinstance(x, ast.ClassDef) and x.name == name)
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    assert last in {x.name for x in scope.body if isinstance(x, kinds)}


def test_no_function_is_named_in_another_form() -> None:
    spans = re.findall(r"`([^`\n]*\.py[^`\n]*)`", DESIGN)
    assert {span for span in spans if span not in FILES} == {
        f"{file}: {path}" for file, path in FUNCTION.findall(DESIGN)
    }
