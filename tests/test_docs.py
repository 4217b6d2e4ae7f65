"""Every block of the documentation is a part of a file that the tests run."""

import importlib
import re
from pathlib import Path

import pytest
import yaml
from plugins_for_tests import make_ctx, parse_callbacks

from rayserve_hooks.cli import main
from rayserve_hooks.context import NodeInfo
from rayserve_hooks.core.failures import hook_error
from rayserve_hooks.core.hooks import HOOKS
from rayserve_hooks.hookspecs import RayServeLLMCallback

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- from: (?P<source>\S+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL
)
CONSOLE = {
    "make demo",  # tests/test_demo.py
    "make install",  # what .ci/run starts with
    "make bench",  # by hand, for an hour; test_the_page_of_benchmarks_is_made_of_the_results
    "make test",  # what .ci/run ends with
    ".venv/bin/rayserve-hooks order examples/serve_config.yaml --app-dir examples",  # test_cli.py
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


def test_the_hook_table_is_the_contract() -> None:
    table = (ROOT / "README.md").read_text().partition("<!-- table: hooks -->\n")[2]
    rows = [line.split("|")[1:-1] for line in table.partition("\n\n")[0].splitlines()[2:]]
    assert tuple(row[0].strip(" `") for row in rows) == HOOKS
    for name, _, _, result in rows:
        spec = getattr(RayServeLLMCallback, name.strip(" `")).rayserve_hooks_spec
        assert ("first result wins" in result) == bool(spec["firstresult"])


def test_the_failure_in_the_readme_is_what_a_failure_says() -> None:
    ctx = make_ctx(node=NodeInfo("4f…", "10.0.0.7", is_local=False))
    error = hook_error(RuntimeError("no such bucket"), ctx, "Fail", "on_before_download")
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
