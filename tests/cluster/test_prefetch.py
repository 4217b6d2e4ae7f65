"""The node stage without an engine, on the nodes of a real cluster."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import s3
import yaml
from cli_shapes import schema_of
from test_cli import write_config

from rayserve_hooks.cli import configs, main
from rayserve_hooks.cluster.prefetch import prefetch as prefetch_nodes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


@pytest.fixture(autouse=True)
def _path_stays(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def store(tiny_model: Path, tmp_path: Path) -> Iterator[s3.Server]:
    shutil.copytree(tiny_model, tmp_path / "models" / "tiny")
    with s3.serving(tmp_path) as server:
        yield server


def write(folder: Path, source: str, *callbacks: Any, **variables: str) -> str:
    path = write_config(folder, list(callbacks))
    whole = yaml.safe_load(Path(path).read_text())
    application = whole["applications"][0]
    application["runtime_env"] = {"env_vars": variables}
    application["args"]["llm_configs"][0]["model_loading_config"]["model_source"] = source
    Path(path).write_text(yaml.safe_dump(whole))
    return path


def prefetch(
    capsys: pytest.CaptureFixture[str], code: int, *arguments: str
) -> tuple[list[dict[str, Any]], str]:
    """Return what is printed as JSON, and what is said on standard error."""
    assert main(["prefetch", *arguments, "--json"]) == code
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    jsonschema.validate(rows, schema_of("prefetch"))
    return rows, captured.err


def test_models_are_there_before_a_replica(
    ray_cluster: Any, store: s3.Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, cache = "s3://anonymous@models/tiny", tmp_path / "cache"
    path = write(tmp_path, source, AWS_ENDPOINT_URL=store.url, HF_HUB_CACHE=str(cache))
    rows, said = prefetch(capsys, 0, path)
    assert [row["node"] for row in rows] == [ray_cluster.head_id, ray_cluster.other_id]
    for row in rows:
        assert (Path(row["model_path"]) / "model.safetensors").is_file()
        assert Path(row["model_path"]).is_relative_to(cache)
        assert (row["callback"], row["error"], row["download_s"] > 0) == ("", "", True)
        place = f"rayserve-hooks: app/m0: node {row['node']} ({row['address']}): "
        assert f"{place}ready\n" in said


def test_each_phase_is_said_when_it_begins(
    ray_cluster: Any, store: s3.Server, tmp_path: Path
) -> None:
    store.faults.append(s3.Fault("held", "config.json"))
    source, cache = "s3://anonymous@models/tiny", tmp_path / "cache"
    path = write(tmp_path, source, AWS_ENDPOINT_URL=store.url, HF_HUB_CACHE=str(cache))
    said: list[str] = []

    def hear(line: str) -> None:
        said.append(line)
        if sum(line.endswith(": download") for line in said) == 2:
            store.released.set()

    done = prefetch_nodes(configs.read(path), on_progress=hear)
    for found in done:
        place = f"app/m0: node {found.node}: "
        assert [line.removeprefix(place) for line in said if line.startswith(place)] in (
            ["waiting for a worker process", "download", "ready"],
            ["waiting for a worker process", "before download", "download", "ready"],
        )


def test_a_chosen_node_and_mode(
    ray_cluster: Any, store: s3.Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "s3://anonymous@models/tiny", AWS_ENDPOINT_URL=store.url)
    only = ["--node", ray_cluster.other_id, "--mode", "TOKENIZER_ONLY"]
    (row,), _ = prefetch(capsys, 0, path, *only)
    assert row["node"] == ray_cluster.other_id
    files = {file.name for file in Path(row["model_path"]).iterdir()}
    assert "tokenizer.json" in files
    assert "model.safetensors" not in files


def test_callbacks_run_and_one_that_fails_ends_its_node_alone(
    ray_cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    brings = {"callback": "doctor_callbacks:Brings", "kwargs": {"folder": str(tmp_path)}}
    rows, _ = prefetch(capsys, 0, write(tmp_path, "placeholder", brings))
    assert {(row["model_path"], row["callback"]) for row in rows} == {(str(tmp_path), "Brings")}
    kwargs = {"folder": str(tmp_path), "fails_on": ray_cluster.other_id}
    path = write(tmp_path, "placeholder", {**brings, "kwargs": kwargs})
    rows, said = prefetch(capsys, 1, path)
    assert [row["ok"] for row in rows] == [True, False]
    assert rows[1]["error"].startswith(
        f"callback 'Brings' failed in hook on_before_download on node {ray_cluster.other_id}"
    )
    assert f"rayserve-hooks: app/m0: {rows[1]['error']}\n" in said
    assert main(["prefetch", path]) == 1
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["ready", "failed"]


def test_a_config_that_ray_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "placeholder")
    whole = yaml.safe_load(Path(path).read_text())
    whole["applications"][0]["args"]["llm_configs"][0]["accelerator_type"] = "no such"
    Path(path).write_text(yaml.safe_dump(whole))
    assert main(["prefetch", path]) == 1
    assert "app/m0: Ray refuses the LLM config: " in capsys.readouterr().err
