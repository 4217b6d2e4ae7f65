"""Every block of the documentation is a part of a file that the tests run."""

import ast
import dataclasses
import importlib
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_args

import error_texts
import pytest
import yaml
from plugins_for_tests import Plain, make_ctx, make_stack, parse_callbacks

import rayserve_hooks
from rayserve_hooks.cli import main
from rayserve_hooks.context import NodeInfo, NodeModelDownloadable
from rayserve_hooks.core.arguments import arguments_model
from rayserve_hooks.core.failures import Blame, hook_error
from rayserve_hooks.core.hooks import HOOKS
from rayserve_hooks.core.limits import TimeLimits
from rayserve_hooks.core.loading import short_names
from rayserve_hooks.hookspecs import RayServeLLMCallback
from rayserve_hooks.impls import compile_cache, startup_metrics
from rayserve_hooks.impls.custom_placement_group import Strategy

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- from: (?P<source>\S+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL
)
SPAN = re.compile(r"(?<!\[)`([^`\n]+)`(?!\])")  # what is a link's text is checked as a link
PATH = re.compile(r"[\w.*-]+(/[\w.*-]+)*(/[\w.*-]*|\.(cfg|md|py|sh|toml|yaml))")
ELSEWHERE = {f".rayserve_hooks/{name}" for name in ("partial", "revisions", "stage")} | {
    "refs/main"
}  # in the model's folder on a node


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_parts_of_tested_files(page: Path) -> None:
    """Each paragraph is; what stands between them in the file may be left out."""
    for block in BLOCK.finditer(page.read_text()):
        if block["language"] == "console":  # tests/test_commands.py runs them
            continue
        assert block["source"], f"names no file: {block['code']}"
        rest = f"\n{(ROOT / block['source']).read_text()}"
        for paragraph in re.split(r"\n\n+", block["code"].rstrip("\n")):
            _, found, rest = rest.partition(f"\n{paragraph}\n")
            assert found, f"{block['source']} does not go on with: {paragraph}"
            rest = f"\n{rest}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_imports_what_it_uses(page: Path) -> None:
    blocks = [b for b in BLOCK.finditer(page.read_text()) if b["language"] == "python"]
    given = ["config = None"] if page.name == "callbacks.md" else []  # the README's, as it says
    code = "\n".join([*given, *(textwrap.dedent(block["code"]) for block in blocks)])
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--quiet", "--select=F821", "-"],
        input=code,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_tables_of_the_shipped_callbacks_are_their_arguments() -> None:
    text = (ROOT / "docs" / "callbacks.md").read_text()
    for name, entry_point in short_names().items():
        if not entry_point.value.startswith("rayserve_hooks.impls."):
            continue
        model = arguments_model(entry_point.load().__init__.__wrapped__)
        schema = model.model_json_schema()
        required = set(schema.get("required", []))
        if not schema["properties"]:
            assert f"`{name}` takes no arguments." in text
            continue
        mark = f"<!-- table: {name} -->"
        assert mark in text, name
        rows = rows_below(text, mark)
        assert [row[0].strip("`") for row in rows] == list(schema["properties"]), name
        for argument, default, _ in rows:
            field = model.model_fields[argument.strip("`")]
            if field.is_required():
                assert default == "required", argument
                assert argument.strip("`") in required
            else:
                expected = json.loads(json.dumps(field.default))
                assert yaml.safe_load(default.strip("`")) == expected, argument


def test_the_metrics_in_the_docs_are_those_that_are_exported() -> None:
    named = re.findall(r"`ray_(rayserve_hooks_\w+)`", (ROOT / "docs" / "callbacks.md").read_text())
    assert set(named) == {*startup_metrics.LABELS, compile_cache.STARTS}


def test_the_docs_name_each_choice_of_the_shipped_callbacks() -> None:
    text = (ROOT / "docs" / "callbacks.md").read_text().partition("## The callbacks that ship")[2]
    choices = {*get_args(Strategy), *NodeModelDownloadable.__members__}
    assert {choice for choice in choices if f"`{choice}`" not in text} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


def spans_of(page: Path) -> list[str]:
    """Return the code spans of a page, without its blocks."""
    return SPAN.findall(BLOCK.sub("", page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_lead_to_files(page: Path) -> None:
    folders = (ROOT, ROOT / "rayserve_hooks", page.parent)
    for path in {span for span in spans_of(page) if PATH.fullmatch(span)} - ELSEWHERE:
        assert any(list(folder.glob(path)) for folder in folders), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_has_every_target_that_a_page_names(page: Path) -> None:
    named = {span.split()[1] for span in spans_of(page) if span.startswith("make ")}
    done = subprocess.run(
        ["make", "--dry-run", *named], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_page_for_contributors_names_the_sections_of_a_hooks_docstring() -> None:
    from test_hookspecs import SECTIONS

    sections = ", ".join(f"`{section}`" for section in SECTIONS)
    assert sections in " ".join((ROOT / "CONTRIBUTING.md").read_text().split())


def rows_below(text: str, mark: str) -> list[list[str]]:
    table = text.partition(mark)[2].lstrip().partition("\n\n")[0]
    return [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_the_changelog_starts_with_this_version_and_lists_changes_of_its_versions() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    versions = dict(re.findall(r"^## (\S+) (.+)$", changelog, re.MULTILINE))
    release, dev, _ = rayserve_hooks.__version__.partition(".dev")
    assert next(iter(versions)) == release
    assert (versions[release] == "(unreleased)") == bool(dev)
    changes = rows_below(changelog, "### Interface changes\n")
    assert {version for version, *_ in changes} <= set(versions)
    assert all(len(row) == 4 and all(row) for row in changes)


def test_the_changelog_says_of_each_module_where_it_is() -> None:
    for before, after in rows_below((ROOT / "CHANGELOG.md").read_text(), "<!-- table: modules -->"):
        assert not module_file(before.removesuffix(", a module")).exists(), before
        for module in after.split(", "):
            assert module_file(module).exists(), module


VARIABLE = re.compile(
    r"\b(?:AWS|AZURE|GOOGLE|HF|HUGGINGFACE|RAY|RAYLLM|RAYSERVE|REQUESTS|SSL|STORAGE|VLLM|XDG)"
    r"_[A-Z0-9_]*[A-Z0-9]\b"
)


def test_the_table_of_variables_has_all_that_the_package_reads_or_names() -> None:
    sources = [path.read_text() for path in (ROOT / "rayserve_hooks").rglob("*.py")]
    nodes = (node for source in sources for node in ast.walk(ast.parse(source)))
    texts = (node.value for node in nodes if isinstance(node, ast.Constant))
    read = {name for text in texts if isinstance(text, str) for name in VARIABLE.findall(text)}
    page = (ROOT / "docs" / "integration.md").read_text()
    rows = rows_below(page, "<!-- table: variables -->")
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(listed) == sorted(read)


def test_there_is_one_table_of_our_variables() -> None:
    for page in PAGES:
        rows = re.findall(r"^\| `RAYSERVE_HOOKS_\w+` \|", page.read_text(), re.MULTILINE)
        assert not rows or page.name == "integration.md", page


def test_the_page_for_operators_has_the_limits_with_their_defaults() -> None:
    page = " ".join((ROOT / "docs" / "integration.md").read_text().split())
    limits = dataclasses.asdict(TimeLimits())
    assert "`on_before_init` and `on_after_init` 1800, `on_init_failed` 60, and none for " in page
    assert {limits["on_before_init"], limits["on_after_init"]} == {1800}
    assert limits["on_init_failed"] == 60
    none = sorted(name for name, seconds in limits.items() if seconds is None)
    assert none == ["download", "on_before_download", "total"]


def module_file(name: str) -> Path:
    return ROOT / (name.strip("`").replace(".", "/") + ".py")


def test_the_hook_table_is_the_contract() -> None:
    table = (ROOT / "README.md").read_text().partition("<!-- table: hooks -->\n")[2]
    rows = [line.split("|")[1:-1] for line in table.partition("\n\n")[0].splitlines()[2:]]
    assert tuple(row[0].strip(" `") for row in rows) == HOOKS
    for name, _, _, result in rows:
        spec = getattr(RayServeLLMCallback, name.strip(" `")).rayserve_hooks_spec
        assert ("first result wins" in result) == bool(spec["firstresult"])


def test_the_history_of_the_hooks_is_theirs_and_each_has_a_callback_that_ships() -> None:
    shipped = {
        name: entry_point.load()
        for name, entry_point in short_names().items()
        if entry_point.value.startswith("rayserve_hooks.impls.")
    }
    page = (ROOT / "docs" / "decisions.md").read_text()
    rows = rows_below(page, "<!-- table: history -->")
    assert tuple(row[0].strip("`") for row in rows) == HOOKS
    for hook, since, uses in rows:
        spec = getattr(RayServeLLMCallback, hook.strip("`"))
        assert f"Since: {since}\n" in spec.__doc__
        using = [name for name, callback in shipped.items() if hasattr(callback, spec.__name__)]
        assert re.findall(r"`(\w+)`", uses) == sorted(using) != []


def test_the_failure_in_the_readme_is_what_a_failure_says() -> None:
    ctx = make_ctx(node=NodeInfo("4f…", "10.0.0.7", is_local=False))
    error = hook_error(RuntimeError("no such bucket"), ctx, Blame("Fail", "on_before_download"))
    way_without = make_stack({"callback": Plain, "name": "Fail"}).way_without("Fail")
    error.advice += f"; {way_without}"
    assert (ROOT / "examples" / "failure.txt").read_text().strip() == str(error)


def test_the_page_of_benchmarks_is_made_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    report = importlib.import_module("report")
    assert (ROOT / "docs" / "benchmarks.md").read_text() == report.page()


@pytest.mark.parametrize("name", ["first_callback", "prepare_node"])
def test_the_yaml_of_a_page_is_in_order(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = ROOT / "examples" / f"{name}.yaml"
    assert main(["order", str(config), "--app-dir", str(ROOT / "examples")]) == 0
    assert f"{name}.py" in capsys.readouterr().out


def test_the_yaml_example_is_a_serve_config_with_callbacks_that_exist() -> None:
    config = yaml.safe_load((ROOT / "examples" / "serve_config.yaml").read_text())
    (application,) = config["applications"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    (llm_config,) = application["args"]["llm_configs"]
    settings = llm_config["callback_config"]
    assert settings["callback_class"] == "rayserve_hooks.HooksCallback"
    for entry in parse_callbacks(settings["callback_kwargs"]["callbacks"]):
        assert entry.create()


def listed_errors() -> list[list[str]]:
    page = (ROOT / "docs" / "errors.md").read_text()
    tables = page.split("<!-- errors -->")[1:]
    return [row for table in tables for row in rows_below(f"x{table}", "x")]


def test_the_page_of_errors_lists_texts_that_exist_each_once_with_what_to_do() -> None:
    rows = listed_errors()
    texts = [row[0].strip("`") for row in rows]
    assert set(texts) - error_texts.everywhere() == set()
    assert sorted(set(texts)) == sorted(texts)
    assert all(len(row) == 3 and all(row) for row in rows)


def test_the_page_of_errors_lists_what_our_errors_say() -> None:
    missing = error_texts.raised() - {row[0].strip("`") for row in listed_errors()}
    rows = "\n".join(f"| `{text}` | why | what to do |" for text in sorted(missing))
    assert not missing, f"add to a table of docs/errors.md:\n{rows}"


@pytest.mark.parametrize(
    "source",
    [
        'raise DownloadError(f"{what} holds nothing; check it")',
        'failure = step_error(ctx, phase, f"{what} holds nothing; check it")',
        'raise self._failed(f"{what} holds " f"nothing; check {it}", error)',
        'detail = f"{what} holds nothing; check it"',
        'problems.append(f"{what} holds nothing; check it")',
        'def f():\n    yield f"{what} holds nothing; check it"',
    ],
)
def test_a_text_is_found_however_an_error_is_made_of_it(source: str) -> None:
    nodes = [
        part for node in ast.walk(ast.parse(source)) for part in error_texts.parts(node, "core")
    ]
    assert "… holds nothing" in {error_texts.what(error_texts.written(node)) for node in nodes}
