"""Every block of the documentation is a part of a file that the tests run."""

import importlib
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from plugins_for_tests import make_ctx, parse_callbacks

import rayserve_hooks
from rayserve_hooks.cli import main
from rayserve_hooks.context import NodeInfo
from rayserve_hooks.core.failures import Blame, hook_error
from rayserve_hooks.core.hooks import HOOKS
from rayserve_hooks.hookspecs import RayServeLLMCallback

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
CONSOLE = {
    "make demo",  # tests/test_demo.py
    "make install",  # what .ci/run starts with
    ".venv/bin/pre-commit install",  # by hand, once; what it then runs is in test_packaging.py
    "make bench",  # by hand, for an hour; test_the_page_of_benchmarks_is_made_of_the_results
    "make test",  # what .ci/run ends with
    ".venv/bin/rayserve-hooks order examples/serve_config.yaml --app-dir examples",  # test_cli.py
    ".venv/bin/rayserve-hooks schema > serve_schema.json",  # tests/cluster/test_schema.py
    ".venv/bin/python examples/quick_start.py",  # tests/test_end_to_end.py
    ".venv/bin/ray start --head --num-cpus 4",  # Ray's own
    "PYTHONPATH=examples .venv/bin/serve run examples/serve_config.yaml",  # likewise
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_parts_of_tested_files(page: Path) -> None:
    blocks = list(BLOCK.finditer(page.read_text()))
    for block in blocks:
        if block["language"] == "console":
            assert {line.removeprefix("$ ") for line in block["code"].splitlines()} <= CONSOLE
        else:
            assert block["source"], f"names no file: {block['code']}"
            assert block["code"] in (ROOT / block["source"]).read_text(), block["source"]


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


def test_the_table_of_variables_has_all_that_the_package_reads() -> None:
    sources = (path.read_text() for path in (ROOT / "rayserve_hooks").rglob("*.py"))
    read = {name for source in sources for name in re.findall(r"RAYSERVE_HOOKS_[A-Z_]+", source)}
    page = (ROOT / "docs" / "callbacks.md").read_text()
    assert {name.strip("`") for name, _ in rows_below(page, "<!-- table: variables -->")} == read


def module_file(name: str) -> Path:
    return ROOT / (name.strip("`").replace(".", "/") + ".py")


def test_the_hook_table_is_the_contract() -> None:
    table = (ROOT / "README.md").read_text().partition("<!-- table: hooks -->\n")[2]
    rows = [line.split("|")[1:-1] for line in table.partition("\n\n")[0].splitlines()[2:]]
    assert tuple(row[0].strip(" `") for row in rows) == HOOKS
    for name, _, _, result in rows:
        spec = getattr(RayServeLLMCallback, name.strip(" `")).rayserve_hooks_spec
        assert ("first result wins" in result) == bool(spec["firstresult"])


def test_the_failure_in_the_readme_is_what_a_failure_says() -> None:
    ctx = make_ctx(node=NodeInfo("4f…", "10.0.0.7", is_local=False))
    error = hook_error(RuntimeError("no such bucket"), ctx, Blame("Fail", "on_before_download"))
    assert (ROOT / "examples" / "failure.txt").read_text().strip() == str(error)


def test_the_page_of_benchmarks_is_made_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    report = importlib.import_module("report")
    assert (ROOT / "docs" / "benchmarks.md").read_text() == report.page()


def test_the_yaml_of_the_callbacks_page_is_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    config = ROOT / "examples" / "prepare_node.yaml"
    assert main(["order", str(config), "--app-dir", str(ROOT / "examples")]) == 0
    assert "prepare_node.py" in capsys.readouterr().out


def test_the_yaml_example_is_a_serve_config_with_callbacks_that_exist() -> None:
    config = yaml.safe_load((ROOT / "examples" / "serve_config.yaml").read_text())
    (application,) = config["applications"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    (llm_config,) = application["args"]["llm_configs"]
    settings = llm_config["callback_config"]
    assert settings["callback_class"] == "rayserve_hooks.HooksCallback"
    for entry in parse_callbacks(settings["callback_kwargs"]["callbacks"]):
        assert entry.create()
