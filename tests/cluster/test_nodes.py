"""A running cluster as the command line sees it: chosen nodes, each of which looks at itself."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from cli_shapes import schema_of
from plugins_for_tests import make_stack, refused
from test_cli import write_config

import rayserve_hooks
from rayserve_hooks.cli import main
from rayserve_hooks.cluster import _ray, nodes
from rayserve_hooks.cluster.serve_config import Deployment
from rayserve_hooks.context import NodeInfo

NODES = [
    NodeInfo("aa11", "10.0.0.1", is_local=True),
    NodeInfo("aa22", "10.0.0.2", is_local=False),
    NodeInfo("bb33", "10.0.0.2", is_local=False),
]


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ray, "live_nodes", lambda: [(node, {}) for node in NODES])


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], ["aa11", "aa22", "bb33"]),
        (["bb"], ["bb33"]),
        (["10.0.0.1", "aa11", "aa22"], ["aa11", "aa22"]),
    ],
)
def test_nodes_are_chosen_by_id_or_address(names: list[str], found: list[str], three: None) -> None:
    assert [node.id for node in nodes.chosen(names)] == found


@pytest.mark.parametrize(
    ("name", "what"),
    [("cc", "no node of the cluster"), ("aa", "that of 2 nodes"), ("10.0.0.2", "that of 2 nodes")],
)
def test_a_name_that_is_no_single_nodes(name: str, what: str, three: None) -> None:
    known = "aa11 (10.0.0.1), aa22 (10.0.0.2), bb33 (10.0.0.2)"
    with refused(f"node {name!r} is {what}; use one of {known}"):
        nodes.chosen([name])


def test_a_folder_of_this_machine_stays_here() -> None:
    application = {"working_dir": "/here", "env_vars": {"A": "1", "B": 2}, "pip": ["x"]}
    llm_config = {"runtime_env": {"env_vars": {"B": "3"}, "py_modules": ["s3://b/m.zip"]}}
    deployment = Deployment("app/m", make_stack(), llm_config, application)
    assert nodes.runtime_env_of(deployment) == {
        "env_vars": {"A": "1", "B": "3"},
        "pip": ["x"],
        "py_modules": ["s3://b/m.zip"],
    }
    assert nodes.runtime_env_of(Deployment("app/m", make_stack(), {})) == {}


def write(folder: Path, callback: Any, **runtime_env: Any) -> str:
    """Write a config whose model is a folder, so that nothing is looked for elsewhere."""
    path = write_config(folder, [callback])
    whole = yaml.safe_load(Path(path).read_text())
    application = whole["applications"][0]
    application["runtime_env"] = runtime_env
    application["args"]["llm_configs"][0]["model_loading_config"]["model_source"] = str(folder)
    Path(path).write_text(yaml.safe_dump(whole))
    return path


@pytest.mark.ray
def test_each_node_looks_at_itself(
    ray_cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "doctor_callbacks:Where", env_vars={"OF_THE_FILE": "yes"})
    assert main(["doctor", path, "--cluster", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    jsonschema.validate(rows, schema_of("doctor"))
    where = {row["node"]: row["detail"] for row in rows if row["subject"].endswith("process")}
    assert [name.partition(" ")[0] for name in where] == [
        "this",
        ray_cluster.head_id,
        ray_cluster.other_id,
    ]
    assert len(set(where.values())) == 3
    assert {detail.partition(" ")[2] for detail in where.values()} == {"yes"}
    assert where["this machine"] == f"{os.getpid()} yes"
    versions = {row["detail"] for row in rows if row["subject"] == "rayserve_hooks"}
    assert versions == {rayserve_hooks.__version__}


@pytest.mark.ray
def test_a_node_without_the_package_is_a_problem(
    ray_cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Python imports this before anything else there.
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent("""
            import sys

            class Absent:
                def find_spec(self, name, path=None, target=None):
                    if name.partition(".")[0] == "rayserve_hooks":
                        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

            sys.meta_path.insert(0, Absent())
        """)
    )
    paths = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    path = write(tmp_path, "doctor_callbacks:Says", env_vars={"PYTHONPATH": paths})
    assert main(["doctor", path, "--node", ray_cluster.other_id, "--json"]) == 1
    row = json.loads(capsys.readouterr().out)[-1]
    assert row["node"].startswith(ray_cluster.other_id)
    assert (row["subject"], row["state"]) == ("rayserve_hooks", "problem")
    assert row["advice"] == "install rayserve_hooks in the image of every node"


@pytest.mark.ray
def test_a_node_whose_process_cannot_start_is_a_problem(
    ray_cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "doctor_callbacks:Says", working_dir="https://127.0.0.1:1/none.zip")
    assert main(["doctor", path, "--node", ray_cluster.other_id, "--json"]) == 1
    row = json.loads(capsys.readouterr().out)[-1]
    assert (row["subject"], row["state"]) == ("node", "problem")
    assert row["detail"].startswith("cannot be looked at: ")


def test_a_cluster_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def refuse(**options: Any) -> None:
        assert options["runtime_env"] == {"working_dir": str(tmp_path)}
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    path = write(tmp_path, "doctor_callbacks:Says")
    arguments = ["--address", "10.0.0.9:6379", "--working-dir", str(tmp_path)]
    assert main(["doctor", path, *arguments]) == 1
    assert capsys.readouterr().err == (
        "rayserve-hooks: cannot connect to a Ray cluster at '10.0.0.9:6379': ConnectionError: "
        "nobody answers; start it, or name it with --address\n"
    )
