"""The command line, in this process, and once as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayserve_hooks.cli import main

ROOT = Path(__file__).parent.parent
EXAMPLE = str(ROOT / "examples" / "serve_config.yaml")


@pytest.fixture(autouse=True)
def _path_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


def write_config(folder: Path, *deployments: list[Any]) -> str:
    llm_configs = [
        {
            "model_loading_config": {"model_id": f"m{index}"},
            "callback_config": {
                "callback_class": "rayserve_hooks.HooksCallback",
                "callback_kwargs": {"callbacks": callbacks},
            },
        }
        for index, callbacks in enumerate(deployments)
    ]
    path = folder / "serve_config.yaml"
    path.write_text(
        yaml.safe_dump({"applications": [{"name": "app", "args": {"llm_configs": llm_configs}}]})
    )
    return str(path)


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main([*arguments, "--json"]) == 0
    loaded: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return loaded


def test_order_of_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "order", EXAMPLE)
    assert [(row["hook"], row["position"], row["callback"], row["options"]) for row in found] == [
        ("on_before_init", 1, "startup_metrics", ["wrapper", "tryfirst"]),
        ("on_before_init", 2, "MyCallback", ["tryfirst"]),
        ("on_before_download", 1, "MyCallback", ["async"]),
        ("on_after_init", 1, "startup_metrics", ["wrapper", "tryfirst"]),
        ("on_after_init", 2, "MyCallback", ["trylast"]),
    ]
    assert {row["deployment"] for row in found} == {"tiny/tiny"}
    assert found[0]["distribution"] == "rayserve_hooks 0.1.0"
    file, _, line = found[1]["source"].rpartition(":")
    lines = Path(file).read_text().splitlines()
    assert "def on_before_init" in "".join(lines[int(line) - 1 : int(line) + 1])


def test_order_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["order", EXAMPLE]) == 0
    header, _, first, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "deployment",
        "hook",
        "position",
        "callback",
        "options",
        "distribution",
        "source",
    ]
    assert first.split()[:6] == [
        "tiny/tiny",
        "on_before_init",
        "1",
        "startup_metrics",
        "wrapper",
        "tryfirst",
    ]


def test_problems_of_all_deployments_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, ["no_such.X"], ["startup_metrics"], [{"callbak": "x"}])
    assert main(["order", path]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(
        "rayserve-hooks: 2 problems:\n- app/m0: callback 'no_such.X': no module"
    )
    assert "- app/m2: callbacks[0] has unknown key 'callbak'; did you mean" in captured.err


def test_a_switched_off_callback_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, ["startup_metrics", "download_policy"])
    monkeypatch.setenv("RAYSERVE_HOOKS_DISABLE", "startup_metrics")
    assert {row["callback"] for row in rows(capsys, "order", path)} == {"download_policy"}


def test_a_config_without_callbacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["order", write_config(tmp_path, [])]) == 0
    assert capsys.readouterr().out == "no callbacks\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "holds no mapping; name a Serve config file"),
        ("a: 1", "has no list 'applications'; name a Serve config file"),
        ("a: [", "cannot read"),
    ],
)
def test_no_serve_config(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert main(["order", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_plugins_lists_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    found = {row["name"]: row for row in rows(capsys, "plugins")}
    assert found["download_policy"]["hooks"] == ["on_before_init", "on_before_download"]
    assert found["startup_metrics"]["distribution"] == "rayserve_hooks 0.1.0"
    assert {"custom_initialization", "custom_placement_group"} <= set(found)


def test_as_a_command_it_imports_no_ray() -> None:
    code = (
        "import sys; from rayserve_hooks.cli import main; main(sys.argv[1:]); "
        "sys.exit('ray' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "order", EXAMPLE, "--app-dir", str(ROOT / "examples")]
    assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0
    script = Path(sys.executable).with_name("rayserve-hooks")
    assert (
        subprocess.run([script, "plugins"], check=False, stdout=subprocess.DEVNULL).returncode == 0
    )
