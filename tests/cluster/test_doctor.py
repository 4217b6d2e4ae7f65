"""What can be known of a machine before a deployment, and what to do where it is not well."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import jsonschema
import moto_server
import pytest
import yaml
from cli_shapes import schema_of
from test_cli import write_config

import rayserve_hooks
from rayserve_hooks.cli import main
from rayserve_hooks.cluster import doctor, versions
from rayserve_hooks.cluster.serve_config import read
from rayserve_hooks.download import node_lock, preflight
from rayserve_hooks.errors import DownloadError, Problems
from rayserve_hooks.findings import Finding

FILES = {"config.json": b"{}", "model.safetensors": b"x" * 3_000_000}
BACKGROUND = {"callback": "engine_callbacks:Background", "kwargs": {"file": "/none"}}
ENTRY_POINTS = importlib.metadata.entry_points
GPU = importlib.metadata.EntryPoint("rayserve_hooks", "rayserve_hooks.x:f", "vllm.general_plugins")


def install_plugins(
    monkeypatch: pytest.MonkeyPatch, *plugins: importlib.metadata.EntryPoint
) -> None:
    """Have these as vLLM's plugins, whatever is installed."""

    def entry_points(**chosen: str) -> Any:
        return list(plugins) if chosen.get("group") == GPU.group else ENTRY_POINTS(**chosen)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


@pytest.fixture(autouse=True)
def _path_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    install_plugins(monkeypatch, GPU)
    versions.check_ray.cache_clear()


def config(folder: Path, *callbacks: Any, **fields: Any) -> str:
    """Write a Serve config with one deployment, of a model that is a folder unless it says so."""
    path = write_config(folder, list(callbacks))
    whole = yaml.safe_load(Path(path).read_text())
    application = whole["applications"][0]
    application["runtime_env"] = fields.pop("application_env", {})
    (llm_config,) = application["args"]["llm_configs"]
    llm_config["model_loading_config"]["model_source"] = str(folder)
    llm_config.update(fields)
    Path(path).write_text(yaml.safe_dump(whole))
    return path


def model(source: Any) -> dict[str, Any]:
    return {"model_loading_config": {"model_id": "m0", "model_source": source}}


def findings(path: str, **options: Any) -> dict[str, Finding]:
    problems = Problems()
    lines = doctor.examine("here", read(path, problems).deployments, **options)
    problems.raise_all()
    assert {line.node for line in lines} == {"here"}
    return {line.finding.subject: line.finding for line in lines}


def test_a_machine_that_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSERVE_HOOKS_LOCK_DIR", str(tmp_path / "locks"))
    found = findings(config(tmp_path, "startup_metrics"))
    version = importlib.metadata.version("ray")
    assert found["Ray"] == Finding("Ray", "ok", f"{version}, which is tested")
    assert found["vLLM"].detail.endswith(f", which fits Ray {version}")
    assert found["rayserve_hooks"].detail == rayserve_hooks.__version__
    assert found["VLLM_PLUGINS"].detail == "leaves out nothing of this package"
    kind = node_lock.file_system_of(tmp_path)
    assert found["lock folder"].detail == f"{tmp_path / 'locks'} on {kind}"
    assert found["callbacks"].detail == "startup_metrics"
    assert found["model"].detail == f"{str(tmp_path)!r} is a folder here"
    assert {finding.state for finding in found.values()} == {"ok"}


@pytest.mark.parametrize(
    ("name", "version", "says"),
    [
        ("ray", "2.55.1", "Ray"),
        ("ray", "", "Ray"),
    ],
)
def test_a_ray_that_does_not_do(
    name: str, version: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray: Any = types.ModuleType(name)
    ray.__version__, ray.is_initialized = version, lambda: False
    monkeypatch.setitem(sys.modules, name, ray if version else None)
    monkeypatch.delenv(versions.TRY_ANYWAY, raising=False)
    finding = findings(config(tmp_path))[says]
    assert finding.state == "problem"
    assert finding.advice.startswith("install 'ray[serve]>=2.56,<2.61'")
    if version:
        monkeypatch.setenv(versions.TRY_ANYWAY, "1")
        versions.check_ray.cache_clear()
        finding = findings(config(tmp_path))[says]
        assert (finding.state, finding.advice.endswith("or try it first")) == ("warning", True)


def test_a_vllm_that_is_absent_or_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_vllm", lambda: ("vllm", "0.1.0"))
    finding = findings(config(tmp_path))["vLLM"]
    assert finding.state == "warning"
    assert finding.detail.startswith("vllm 0.1.0; tested with Ray 2.")
    monkeypatch.setattr(versions, "ENGINE_PACKAGES", ("no_such_module_a", "os", "no_such_b"))
    finding = findings(config(tmp_path))["vLLM"]
    assert finding.state == "problem"
    assert finding.detail.endswith(" needs the packages 'no_such_module_a', 'no_such_b'")
    assert finding.advice.startswith("install 'rayserve_hooks[engine]'")
    assert finding.advice.endswith("wherever replicas run")


def test_another_release_than_the_one_that_deploys(tmp_path: Path) -> None:
    finding = findings(config(tmp_path), version="0.0.1")["rayserve_hooks"]
    assert finding.detail == f"{rayserve_hooks.__version__} here, and 0.0.1 deploys"
    assert (finding.state, "install the same" in finding.advice) == ("problem", True)


@pytest.mark.parametrize(
    ("callback", "state", "whose"),
    [
        (BACKGROUND, "problem", "; needed by Background"),
        ("startup_metrics", "warning", "; no callback needs it"),
    ],
)
def test_plugins_of_vllm_that_leave_ours_out(
    callback: Any, state: str, whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the file sets it for the replicas, wherever.
    for name in ("application_env", "runtime_env"):
        path = config(tmp_path, callback, **{name: {"env_vars": {"VLLM_PLUGINS": "other"}}})
        finding = findings(path)["VLLM_PLUGINS"]
        assert finding.state == state
        assert finding.detail.startswith("VLLM_PLUGINS is 'other', so that vLLM does not load")
        assert finding.detail.endswith(whose)
        assert finding.advice == "set VLLM_PLUGINS=other,rayserve_hooks, or remove it"
    assert "VLLM_PLUGINS" not in os.environ
    install_plugins(monkeypatch)
    finding = findings(config(tmp_path, callback))["VLLM_PLUGINS"]
    assert finding.state == state
    assert finding.advice.startswith("install rayserve_hooks on this node with pip")


def test_a_lock_folder_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locks").write_text("")
    monkeypatch.setenv("RAYSERVE_HOOKS_LOCK_DIR", str(tmp_path / "locks"))
    finding = findings(config(tmp_path))["lock folder"]
    assert finding.state == "problem"
    assert "set RAYSERVE_HOOKS_LOCK_DIR to a folder" in finding.advice


def test_callbacks_that_cannot_be_built(tmp_path: Path) -> None:
    finding = findings(config(tmp_path, "no_such_module_here:X"))["callbacks"]
    assert finding.state == "problem"
    assert finding.detail.startswith("callback 'no_such_module_here:X': no module named")


def test_a_bucket_and_the_space_for_it(
    moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moto_server.fill(moto, "models", {f"tiny/{path}": body for path, body in FILES.items()})
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    source = {
        "bucket_uri": "s3://models/tiny",
        "extra_files": [{"bucket_uri": "s3://models/none", "destination_path": "/x"}],
    }
    path = config(tmp_path, **model(source))
    found = findings(path)
    assert found["model"].detail == "s3://models/tiny: 2 files, 3.0 MB; can be listed and read"
    assert found["extra files"].state == "problem"
    assert found["cache folder"].detail.startswith(f"{tmp_path / 'cache' / 'models--m0'} on ")
    assert found["free space"].state == "ok"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1_000_000))
    assert findings(path)["free space"] == Finding(
        "free space",
        "problem",
        "1.0 MB for a model of 3.0 MB",
        "free 2.0 MB, or set HF_HOME to a larger disk",
    )
    held = tmp_path / "cache" / "models--m0"
    held.mkdir(parents=True)
    (held / "blob").write_bytes(b"x" * 4_000_000)
    assert findings(path)["free space"].state == "ok"


@pytest.mark.parametrize(
    ("callback", "state"), [("doctor_callbacks:Says", "problem"), ("download_policy", "warning")]
)
def test_a_model_that_is_nowhere_is_a_warning_where_a_callback_may_bring_it(
    callback: str, state: str, moto: str, tmp_path: Path
) -> None:
    finding = findings(config(tmp_path, callback, **model("s3://models/none")))["model"]
    assert (finding.state, finding.detail[:30]) == (state, "cannot list s3://models/none: ")
    finding = findings(config(tmp_path, callback, **model("/no/such/folder")))["model"]
    assert (finding.state, finding.detail) == (state, "'/no/such/folder' is no folder here")


def test_a_hub_that_cannot_be_asked_is_a_warning_where_the_cache_has_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> preflight.Wanted:
        raise DownloadError("cannot list 'org/m': offline; check the network")

    monkeypatch.setattr(preflight, "look_at_hub", refuse)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    path = config(tmp_path, **model("org/m"))
    expected = Finding("model", "problem", "cannot list 'org/m': offline", "check the network")
    assert findings(path)["model"] == expected
    held = tmp_path / "cache" / "models--org--m"
    held.mkdir(parents=True)
    (held / "blob").write_bytes(b"x" * 4096)
    assert findings(path)["model"] == dataclasses.replace(expected, state="warning")


def test_an_engine_that_streams_needs_no_space(moto: str, tmp_path: Path) -> None:
    moto_server.fill(moto, "models", {"tiny/config.json": b"{}"})
    streams = {"engine_kwargs": {"load_format": "runai_streamer"}}
    found = findings(config(tmp_path, **model("s3://models/tiny"), **streams))
    assert found["cache folder"].detail == "not needed: the engine streams the weights"
    assert "free space" not in found


@pytest.mark.parametrize(
    ("place", "state", "text"),
    [
        ({"problem": "'/x' cannot be written by user 7"}, "problem", "'/x' cannot be written by"),
        ({"file_system": "tmpfs"}, "warning", "/c on tmpfs, which is memory"),
        (
            {"file_system": "fuse.sshfs", "shared": False},
            "warning",
            "/c on fuse.sshfs, where a lock may count on one node only",
        ),
        ({"file_system": "nfs4"}, "ok", "/c on nfs4"),
        ({"file_system": "", "shared": False}, "ok", "/c on an unknown file system"),
    ],
)
def test_a_cache_folder_is_told_by_its_file_system(
    place: dict[str, Any], state: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = {"file_system": "ext4", "shared": True, "free": 7, "held": 0, "problem": ""}
    found = preflight.Place(Path("/c"), **{**usual, **place})
    monkeypatch.setattr(preflight, "place_of", lambda _: found)
    monkeypatch.setattr(preflight, "look_at_hub", lambda *_: preflight.Wanted("x", 1, 0))
    finding = findings(config(tmp_path, **model("org/m")))["cache folder"]
    assert (finding.state, finding.detail.startswith(text)) == (state, True)


def test_a_callback_adds_lines_without_its_secrets(tmp_path: Path) -> None:
    kwargs = {"state": "problem", "hf_token": "s3cret-token"}
    says = {"callback": "doctor_callbacks:Says", "kwargs": kwargs}
    found = findings(config(tmp_path, says))
    assert found["callback 'Says': disk"] == Finding(
        "callback 'Says': disk", "problem", "is there for m0 ***", "mount it"
    )


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("Fails", "doctor() failed: RuntimeError: no answer for ***"),
        (
            "Wrong",
            (
                "doctor() failed: TypeError: doctor() yields a str; yield Finding(subject, state, "
                "detail, advice)"
            ),
        ),
    ],
)
def test_a_callback_whose_doctor_fails_is_a_problem(name: str, detail: str, tmp_path: Path) -> None:
    callback = {"callback": f"doctor_callbacks:{name}", "kwargs": {"hf_token": "s3cret-token"}}
    found = findings(config(tmp_path, callback))
    subject = f"callback {name!r}"
    assert found[subject] == Finding(subject, "problem", detail, "fix the callback")
    assert found["model"].state == "ok"  # it goes on


def test_the_example_of_the_page(tmp_path: Path) -> None:
    callback = {"callback": "checked_folder:CheckedFolder", "kwargs": {"folder": str(tmp_path)}}
    found = findings(config(tmp_path, callback))
    assert found["callback 'CheckedFolder': folder"].advice == "mount it on every node"
    (tmp_path / "config.json").write_text("{}")
    found = findings(config(tmp_path, callback))
    assert found["callback 'CheckedFolder': folder"].detail == f"{tmp_path} holds a model"


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("warning", 0), ("problem", 1)])
def test_the_command(
    state: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = {"callback": "doctor_callbacks:Says", "kwargs": {"state": state}}
    path = config(tmp_path, callback)
    assert main(["doctor", path, "--json"]) == code
    printed = json.loads(capsys.readouterr().out)
    jsonschema.validate(printed, schema_of("doctor"))
    assert printed[-2]["subject"] == "callback 'Says': disk"
    assert {row["node"] for row in printed} == {"this machine"}
    assert main(["doctor", path]) == code
    text = capsys.readouterr().out
    assert text.startswith("this machine\nstate ")
    problems, warnings = int(state == "problem"), int(state == "warning")
    assert text.endswith(f"\n{problems} problems, {warnings} warnings\n")


def test_what_is_only_on_the_cluster_is_looked_for_there_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, {"callback": "only_there:Fetch", "only_on_cluster": True})
    assert main(["doctor", path]) == 0
    capsys.readouterr()
    assert findings(path)["callbacks"].state == "problem"


def test_the_command_needs_a_config_that_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", write_config(tmp_path, [{"callbak": "x"}])]) == 1
    assert "callbacks[0] has unknown key 'callbak'" in capsys.readouterr().err
