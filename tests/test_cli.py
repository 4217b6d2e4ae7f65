"""The command line, in this process, and once as a user calls it."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayserve_hooks import CallbackCtx, RayServeLLMCallback
from rayserve_hooks.cli import main

ROOT = Path(__file__).parent.parent
EXAMPLE = str(ROOT / "examples" / "serve_config.yaml")
DISTRIBUTION = f"rayserve_hooks {importlib.metadata.version('rayserve_hooks')}"


@pytest.fixture(autouse=True)
def _path_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


def write_config(folder: Path, *deployments: list[Any], **kwargs: Any) -> str:
    """Write a Serve config; ``kwargs`` are added to each deployment's ``callback_kwargs``."""
    llm_configs = [
        {
            "model_loading_config": {"model_id": f"m{index}"},
            "callback_config": {
                "callback_class": "rayserve_hooks.HooksCallback",
                "callback_kwargs": {"callbacks": callbacks, **kwargs},
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
    assert found[0]["distribution"] == DISTRIBUTION
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


def test_the_callbacks_of_a_clean_up_are_listed_in_reverse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows(
        capsys, "order", write_config(tmp_path, ["cli_callbacks:First", "cli_callbacks:Second"])
    )
    assert [(row["hook"], row["position"], row["callback"]) for row in found] == [
        ("on_before_init", 1, "First"),
        ("on_before_init", 2, "Second"),
        ("on_init_failed", 1, "Second"),
        ("on_init_failed", 2, "First"),
    ]


def test_a_callback_that_is_only_on_the_cluster_is_listed_without_its_hooks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = {"callback": "only_there:Fetch", "only_on_cluster": True, "on_error": "warn"}
    found = rows(capsys, "order", write_config(tmp_path, ["cli_callbacks:First", absent]))
    assert [row["callback"] for row in found] == ["First", "First", "Fetch"]
    assert found[2] == {
        "deployment": "app/m0",
        "hook": "?",
        "position": 2,
        "callback": "Fetch",
        "options": ["only_on_cluster"],
        "distribution": "",
        "source": "only_there:Fetch",
    }


@pytest.mark.parametrize("whole", [True, False])
def test_a_callback_whose_failure_is_only_logged_says_so(
    whole: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback: Any = "cli_callbacks:First"
    path = write_config(
        tmp_path, [callback if whole else {"callback": callback, "on_error": "warn"}]
    )
    if whole:
        config = yaml.safe_load(Path(path).read_text())
        (llm_config,) = config["applications"][0]["args"]["llm_configs"]
        llm_config["callback_config"]["raise_error_on_callback"] = False
        Path(path).write_text(yaml.safe_dump(config))
    assert [row["options"] for row in rows(capsys, "order", path)] == [["on_error=warn"]] * 2


def test_limits_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = {"downlod": 60, "total": 0}
    assert main(["order", write_config(tmp_path, [], time_limits=limits)]) == 1
    assert capsys.readouterr().err == (
        "rayserve-hooks: 2 problems:\n"
        "- app/m0: time_limits: total is 0; write seconds, more than 0, or null for no limit\n"
        "- app/m0: time_limits has unknown key 'downlod'; did you mean 'download'?\n"
    )


def write_llm_config(folder: Path, llm_config: dict[str, Any]) -> str:
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump({"applications": [{"args": {"llm_configs": [llm_config]}}]}))
    return str(path)


def test_a_config_in_a_file_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm_config = tmp_path / "llm_config.yaml"
    kwargs = {"callback_kwargs": {"callbacks": ["cli_callbacks:First"]}}
    llm_config.write_text(yaml.safe_dump({"callback_config": kwargs}))
    path = tmp_path / "serve_config.yaml"
    args = {"llm_configs": [str(llm_config)]}
    path.write_text(yaml.safe_dump({"applications": [{"args": args}]}))
    assert {row["deployment"] for row in rows(capsys, "order", str(path))} == {"default/?"}


@pytest.mark.slow  # it imports Ray
def test_a_ray_callback_instead_of_ours_is_a_list_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"callback_class": "ray_callbacks:Strict"}
    path = write_llm_config(tmp_path, {"callback_config": settings})
    assert [(row["hook"], row["callback"]) for row in rows(capsys, "order", path)] == [
        ("on_before_init", "Strict"),
        ("on_before_download", "Strict"),
        ("on_after_init", "Strict"),
    ]


@pytest.mark.slow  # it imports Ray
def test_a_wrong_argument_of_a_ray_callback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"callback_class": "ray_callbacks:Strict", "callback_kwargs": {"pahts": []}}
    assert main(["order", write_llm_config(tmp_path, {"callback_config": settings})]) == 1
    assert capsys.readouterr().err == (
        "rayserve-hooks: default/?: callback 'Strict': ray_callbacks.Strict refused kwargs "
        "['pahts']: got an unexpected keyword argument 'pahts'\n"
    )


def test_a_secret_among_kwargs_reaches_no_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kwargs = {"hf_token": "s3cret"}
    refused = {"callback": "cli_callbacks:Refuses", "kwargs": kwargs}
    assert main(["order", write_config(tmp_path, [refused])]) == 1
    captured = capsys.readouterr()
    assert "ValueError: cannot use ***" in captured.err
    assert "s3cret" not in captured.out + captured.err


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
        ("applications: [x]", "applications holds 'x', no mapping"),
    ],
)
def test_no_serve_config(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert main(["order", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_an_installed_callback_that_cannot_be_imported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry_point = importlib.metadata.EntryPoint("fetch", "no_such_module:Fetch", "rayserve_hooks")
    monkeypatch.setattr("rayserve_hooks.cli.short_names", lambda: {"fetch": entry_point})
    assert main(["plugins"]) == 1
    assert capsys.readouterr().err == (
        "rayserve-hooks: short name 'fetch': ModuleNotFoundError(\"No module named "
        "'no_such_module'\")\n"
    )


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["order", "no_such.yaml"]) == 1
    assert capsys.readouterr().err.startswith(
        "rayserve-hooks: cannot read 'no_such.yaml': [Errno 2] No such file or directory"
    )


def test_plugins_lists_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    found = {row["name"]: row for row in rows(capsys, "plugins")}
    assert found["download_policy"]["hooks"] == ["on_before_init", "on_before_download"]
    assert found["startup_metrics"]["distribution"] == DISTRIBUTION
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


class OneHook(RayServeLLMCallback):
    def on_after_init(self, ctx: CallbackCtx) -> None: ...


def test_plugins_lists_only_the_hooks_that_a_subclass_defines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry_point = importlib.metadata.EntryPoint("one", f"{__name__}:OneHook", "rayserve_hooks")
    monkeypatch.setattr("rayserve_hooks.cli.short_names", lambda: {"one": entry_point})
    (row,) = rows(capsys, "plugins")
    assert row["hooks"] == ["on_after_init"]
