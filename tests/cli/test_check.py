"""``rayserve-hooks check``: an exit code and every problem, also against a working_dir."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_cli import EXAMPLE, write_config

from rayserve_hooks.cli import main

ROOT = Path(__file__).parent.parent.parent
CALLBACK = "class Mine:\n    def on_before_init(self, ctx): ...\n"


@pytest.fixture(autouse=True)
def _path_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def working_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a module of callbacks, which is forgotten after the test."""
    folder = tmp_path / "app"
    (folder / "inner").mkdir(parents=True)
    (folder / "inside_working_dir.py").write_text(CALLBACK)
    (folder / "inner" / "below.py").write_text(CALLBACK)
    for name in ("inside_working_dir", "inner", "inner.below"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    return folder


def report(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> dict[str, Any]:
    assert main(["check", *arguments, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_config_that_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", EXAMPLE]) == 0
    assert capsys.readouterr().out == "ok\ntiny/tiny: startup_metrics, MyCallback\n"
    assert report(capsys, 0, EXAMPLE) == {
        "ok": True,
        "deployments": [
            {"deployment": "tiny/tiny", "callbacks": ["startup_metrics", "MyCallback"]}
        ],
        "problems": [],
        "unseen": [],
    }


def test_every_problem_of_every_deployment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, ["no_such.X"], ["startup_metrics"], [{"callbak": "x"}])
    assert main(["check", path]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("rayserve-hooks: 2 problems:\n- app/m")
    found = report(capsys, 1, path)
    assert (found["ok"], len(found["problems"])) == (False, 2)
    assert "app/m0: callback 'no_such.X': no module" in found["problems"][1]


def test_what_is_in_the_working_dir_or_installed_is_found(
    tmp_path: Path, working_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = ["inside_working_dir:Mine", {"callback": "inner.below:Mine", "name": "below"}]
    path = write_config(tmp_path, [*callbacks, "startup_metrics"])
    assert main(["check", path, "--working-dir", str(working_dir)]) == 0
    assert capsys.readouterr().out == "ok\napp/m0: Mine, below, startup_metrics\n"


def test_what_is_only_on_this_machine_is_a_problem(
    tmp_path: Path, working_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, ["cli_callbacks:First", "startup_metrics"])
    assert main(["check", path, "--working-dir", str(working_dir)]) == 1
    file = ROOT / "tests" / "cli_callbacks.py"
    assert capsys.readouterr().err == (
        f"rayserve-hooks: app/m0: callback 'First' is in {str(file)!r}, which is neither in the "
        f"working_dir {str(working_dir)!r} nor installed; move it there, or install it in the "
        "image\n"
    )


@pytest.mark.parametrize(
    ("name", "line"), [(".gitignore", "in*.py"), (".rayignore", "/inside_working_dir.py")]
)
def test_what_ray_does_not_send_is_a_problem(
    name: str, line: str, working_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (working_dir / name).write_text(f"# generated\n{line}\n")
    path = write_config(working_dir, ["inside_working_dir:Mine"])
    assert main(["check", path, "--working-dir", str(working_dir)]) == 1
    assert f"which {name} keeps out of the working_dir that Ray sends" in capsys.readouterr().err


def test_without_the_library_that_reads_such_lists_they_are_named(
    working_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (working_dir / ".gitignore").write_text("*.py\n")
    path = write_config(working_dir, ["inside_working_dir:Mine"])
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pathspec" else find_spec(name)
    )
    (unseen,) = report(capsys, 0, path, "--working-dir", str(working_dir))["unseen"]
    assert unseen == (
        f"{str(working_dir / '.gitignore')!r} is not read; install 'rayserve_hooks[cli]' to have "
        "it checked"
    )


@pytest.mark.slow
def test_a_callback_of_rays_kind_is_looked_for_where_its_class_is(
    tmp_path: Path, working_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, ["ray_callbacks:TakesOver"])
    assert main(["check", path, "--working-dir", str(working_dir)]) == 1
    file = ROOT / "tests" / "ray_callbacks.py"
    assert f"callback 'TakesOver' is in {str(file)!r}, which is neither" in capsys.readouterr().err


def test_a_working_dir_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", EXAMPLE, "--working-dir", "no_such"]) == 1
    assert capsys.readouterr().err == (
        "rayserve-hooks: working_dir 'no_such' is no folder; name the one that the cluster gets\n"
    )
