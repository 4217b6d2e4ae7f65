"""What ``docs/migration.md`` says: every name of Ray's is there, and what is after is as before."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayserve_hooks.cli import main
from rayserve_hooks.impls.cloud_files import CloudFiles
from rayserve_hooks.testing import RunStack

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "migration.md").read_text()


def rays(module: str) -> dict[str, ast.ClassDef]:
    """Return the classes of a module of Ray's callbacks; read, since to import it takes seconds."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "llm" / "_internal" / "common" / "callbacks"
    body = ast.parse((folder / f"{module}.py").read_text()).body
    return {node.name: node for node in body if isinstance(node, ast.ClassDef)}


def names_of(node: ast.ClassDef) -> set[str]:
    """Return a class's public methods, fields and attributes."""
    names = {
        item.name for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    names |= {ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign)}
    names |= {
        target.attr
        for item in ast.walk(node)
        if isinstance(item, ast.Assign)
        for target in item.targets
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
    }
    return {name for name in names if not name.startswith("_") or name == "__init__"}


def test_the_table_has_every_name_of_rays_callbacks() -> None:
    table = PAGE.partition("<!-- table: names -->")[2].lstrip().partition("\n\n")[0]
    theirs = " ".join(line.split("|")[1] for line in table.splitlines()[2:])
    base = rays("base")
    assert base.keys() == {"CallbackBase", "CallbackCtx", "CallbackConfig"}
    wanted = {*base, "CloudDownloader", *rays("cloud_downloader").keys() & {"CloudDownloader"}}
    for node in (*base.values(), rays("cloud_downloader")["CloudDownloaderConfig"]):
        wanted |= names_of(node) - {"validate_paths"}
    assert {name for name in wanted if name not in theirs} == set()


def arguments(file: str) -> dict[str, Any]:
    (application,) = yaml.safe_load((ROOT / "examples" / file).read_text())["applications"]
    (llm_config,) = application["args"]["llm_configs"]
    found: dict[str, Any] = llm_config
    return found


def test_cloud_files_takes_the_arguments_of_rays_downloader_as_they_are() -> None:
    before = arguments("cloud_downloader.yaml")["callback_config"]
    (after,) = arguments("cloud_files.yaml")["callbacks"]
    assert after["kwargs"] == before["callback_kwargs"]
    assert CloudFiles(**after["kwargs"]).paths == [("s3://bucket/templates", "/opt/templates")]
    module, _, name = before["callback_class"].rpartition(".")
    assert name in rays(module.rpartition(".")[2])


@pytest.mark.ray  # whose import warns of its own dependencies
def test_ray_takes_what_is_before() -> None:
    from ray.llm._internal.common.callbacks.cloud_downloader import CloudDownloader
    from ray.serve.llm import LLMConfig

    config = LLMConfig(**arguments("cloud_downloader.yaml"))
    settings = config.callback_config
    assert settings.callback_class == f"{CloudDownloader.__module__}.CloudDownloader"
    callback = CloudDownloader(llm_config=config, **settings.callback_kwargs)
    assert callback.kwargs["paths"] == [["s3://bucket/templates", "/opt/templates"]]


@pytest.mark.parametrize("file", ["cloud_downloader.yaml", "cloud_files.yaml", "migrated.yaml"])
def test_the_configs_are_in_order(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["order", str(ROOT / "examples" / file)]) == 0
    assert "on_before_download" in capsys.readouterr().out


def test_ours(run_stack: RunStack) -> None:
    ours = {"callback": "migrated:Ours", "kwargs": {"folder": "/models"}}
    run_stack(ours).assert_order(
        [
            "replica: on_before_init: Ours",
            "replica: on_before_download: Ours",
            "replica: on_after_init: Ours",
        ]
    )


@pytest.mark.slow
def test_rays(run_stack: RunStack) -> None:
    stock = {"callback": "migrated:Stock", "kwargs": {"folder": "/models"}}
    run_stack(stock, nodes=2).assert_order(
        [
            "replica: on_before_init: Stock",
            "replica: on_before_download: Stock",
            "node-2: on_before_download: Stock",
            "replica: on_after_init: Stock",
        ]
    )
