"""The JSON of each command has the documented shape, and a terminal gets colours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cli_shapes import schema_of
from test_cli import EXAMPLE
from test_docs import rows_below

from rayserve_hooks.cli import main
from rayserve_hooks.cli.output import SHAPES, table

PAGE = (Path(__file__).parent.parent.parent / "docs" / "command_line.md").read_text()
ROWS: list[dict[str, object]] = [
    {"state": "ok", "found": "all"},
    {"state": "problem", "found": ["a", "b"]},
]


@pytest.fixture(autouse=True)
def _path_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize("command", ["order", "check", "plugins"])
def test_what_is_printed_has_the_shape(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [] if command == "plugins" else [EXAMPLE]
    assert main([command, *arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed
    jsonschema.validate(printed, schema_of(command))


def test_the_schema_is_the_same_with_and_without_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    plain = capsys.readouterr().out
    assert main(["schema", "--json"]) == 0
    assert capsys.readouterr().out == plain
    jsonschema.Draft202012Validator.check_schema(json.loads(plain))


@pytest.mark.parametrize("command", SHAPES)
def test_the_page_has_each_key_with_its_type(command: str) -> None:
    names = {"string": "text", "integer": "number", "number": "number", "boolean": "true or false"}
    schema = schema_of(command)
    outer = schema.get("properties") or next(iter(schema["$defs"].values()))["properties"]

    def shown(value: dict[str, Any]) -> str:
        if "anyOf" in value:
            return " or ".join(shown(part) for part in value["anyOf"])
        if "$ref" in value:
            inner = schema["$defs"][value["$ref"].rpartition("/")[2]]["properties"]
            return f"mapping of {', '.join(f'`{key}`' for key in inner)}"
        if value["type"] == "array":
            return f"list of {shown(value['items'])}"
        return {**names, "null": "null"}[value["type"]]

    rows = rows_below(PAGE, f"<!-- json: {command} -->")
    expected = [[f"`{key}`", shown(value)] for key, value in outer.items()]
    assert [row[:2] for row in rows] == expected


def test_a_terminal_gets_colours_and_a_file_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = table(ROWS, "nothing")
    assert plain.splitlines()[2:] == ["ok       all", "problem  a b"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = table(ROWS, "nothing")
    assert "\x1b[32mok" in coloured
    assert "\x1b[31mproblem" in coloured


def test_without_rich_a_terminal_gets_the_plain_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert table(ROWS, "nothing").splitlines()[2:] == ["ok       all", "problem  a b"]
    assert table([], "nothing") == "nothing"


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("do", {"doctor"}),
        ("prefetch --m", {"--mode"}),
        ("prefetch --mode T", {"TOKENIZER_ONLY"}),
        ("", {"check", "doctor", "order", "plugins", "prefetch", "schema"}),
    ],
)
def test_a_shell_completes_commands_and_options(
    typed: str, completed: set[str], tmp_path: Path
) -> None:
    line, found = f"rayserve-hooks {typed}", tmp_path / "found"
    variables = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(found),
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    code = "from rayserve_hooks.cli import main; main([])"
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=20)
    words = {word.strip() for word in found.read_text().split("\n")}
    assert words - {"--help", "--version", "-h"} == completed


@pytest.mark.slow
def test_help_is_there_within_half_a_second() -> None:
    from plugins_for_tests import run_script

    seconds = []
    for _ in range(3):  # of a machine that others use, too
        started = time.monotonic()
        run_script(
            """
            import contextlib, sys
            from rayserve_hooks.cli import main
            with contextlib.suppress(SystemExit):
                main(["--help"])
            heavy = {"pydantic", "pluggy", "ray", "rich", "yaml"} & set(sys.modules)
            assert not heavy, heavy
            """
        )
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 0.5
