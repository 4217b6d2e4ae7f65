from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hub
import pytest
from plugins_for_tests import run_script

from rayserve_hooks.errors import CallbackConfigError
from rayserve_hooks.impls.hf_prefetch import HfPrefetch

MODEL = "org/tiny"
FILES = {
    "config.json": b"{}",
    "model.safetensors.index.json": b'{"weight_map": {"a": "one.safetensors"}}',
    "one.safetensors": b"weights",
    "readme.md": b"read me",
}
RUN = """
    import json
    from rayserve_hooks.impls.cloud_files import CloudFiles
    from rayserve_hooks.impls.hf_prefetch import HfPrefetch
    from rayserve_hooks.testing.run import simulate
    prefetch = HfPrefetch("org/tiny", {revision!r}, ignore_patterns=["*.md"])
    outcome = simulate([prefetch, CloudFiles({paths})] if {paths} else prefetch, nodes=2)
    if outcome.error is not None:
        raise SystemExit(print(json.dumps([str(outcome.error.__cause__)])))
    assert {{node.model_path for node in outcome.nodes.values()}} == {{outcome.model_path}}
    print(json.dumps([outcome.model_path, *outcome.order]))
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub.Hub]:
    folder = tmp_path / "hub" / MODEL
    folder.mkdir(parents=True)
    for name, held in FILES.items():
        (folder / name).write_bytes(held)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAYSERVE_HOOKS_LOCK_DIR", str(tmp_path / "locks"))
    with hub.serving(tmp_path / "hub") as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def started(revision: str = "main", paths: Sequence[Sequence[str]] = ()) -> list[str]:
    """Run two nodes in a process of its own, whose environment the Hub's client reads.

    Returns:
        What the engine would load, the same from both nodes, and in which order callbacks ran; or
        what has failed.
    """
    told: list[str] = json.loads(
        run_script(RUN.format(revision=revision, paths=paths), timeout_s=60)
    )
    return told


def run(revision: str = "main") -> str:
    return started(revision)[0]


@pytest.mark.slow
class TestOnAHub:
    def test_a_branch_is_looked_up_once_and_all_nodes_get_its_commit(self, server: hub.Hub) -> None:
        folder = Path(run())
        assert folder.parts[-3:] == ("models--org--tiny", "snapshots", hub.COMMIT)
        names = {path.name for path in folder.iterdir()}
        assert names == FILES.keys() - {"readme.md"}
        assert len([asked for asked in server.requests if "/revision/" in asked]) == 1
        assert len([asked for asked in server.requests if asked.startswith("GET /org")]) == 3

    def test_a_commit_is_not_looked_up(self, server: hub.Hub) -> None:
        run(hub.COMMIT)
        assert not [asked for asked in server.requests if "/revision/" in asked]

    def test_the_token_is_that_of_the_environment(
        self, server: hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server.token = "SECRET"
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "token").write_text("SECRET")  # of a login: not used
        assert "check the id, HF_TOKEN and whether the token may read the model" in run()
        monkeypatch.setenv("HF_TOKEN", "SECRET")
        assert run().endswith(hub.COMMIT)

    def test_offline_nothing_is_asked(
        self, server: hub.Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = run(hub.COMMIT)
        server.requests.clear()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert run(hub.COMMIT) == folder
        assert server.requests == []

    def test_offline_what_is_not_complete_is_not_served(
        self, server: hub.Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = Path(run(hub.COMMIT))
        (folder / "one.safetensors").unlink()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        text = run(hub.COMMIT)
        assert re.match(r"cannot fetch .org/tiny. from the Hugging Face Hub: .*Incomplete", text)

    def test_a_file_that_was_cut_off_is_fetched_again(self, server: hub.Hub) -> None:
        folder = Path(run(hub.COMMIT))
        (folder / "one.safetensors").resolve().write_bytes(b"wei")
        assert Path(run(hub.COMMIT)) == folder
        assert (folder / "one.safetensors").read_bytes() == FILES["one.safetensors"]

    def test_a_hub_that_is_gone(self, server: hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
        assert run(hub.COMMIT).endswith("; check the id, HF_ENDPOINT and the network")

    def test_listed_first_it_runs_last(self, server: hub.Hub, tmp_path: Path) -> None:
        (tmp_path / "extra").mkdir()
        (tmp_path / "extra" / "a.txt").write_text("A")
        paths = [[(tmp_path / "extra").as_uri(), str(tmp_path / "there")]]
        path, *order = started(paths=paths)
        assert Path(path).name == hub.COMMIT
        assert order == [
            "replica: on_before_init: HfPrefetch",
            "replica: on_before_download: CloudFiles",
            "replica: on_before_download: HfPrefetch (handled)",
            "node-2: on_before_download: CloudFiles",
            "node-2: on_before_download: HfPrefetch (handled)",
        ]
        assert (tmp_path / "there" / "a.txt").read_text() == "A"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"repo_id": "org/tiny"}, " has no argument 'revision'; add it"),
        (
            {"repo_id": "/models/tiny", "revision": "main"},
            "(repo_id='/models/tiny'): write a model of",
        ),
        ({"repo_id": "a/b", "revision": ""}, "(revision=''): write a commit, a branch or a tag"),
        (
            {"repo_id": "a/b", "revision": "main", "parallel_files": 0},
            "(parallel_files=0): write at least 1",
        ),
        (
            {"repo_id": "a/b", "revision": "main", "token": "hf_x"},
            " has unknown argument 'token'; use one of allow_patterns",
        ),
        (
            {"repo_id": "a/b", "revision": "main", "allow_patterns": "*.json"},
            "(allow_patterns='*.json'): write a list, even of one item",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(CallbackConfigError, match=f"^HfPrefetch{re.escape(text)}"):
        HfPrefetch(**arguments)


def test_importing_it_imports_nothing_heavy() -> None:
    code = """
        import sys, rayserve_hooks.impls.hf_prefetch
        print(sorted({"huggingface_hub", "obstore", "ray", "torch"} & set(sys.modules)))
    """
    assert run_script(code) == "[]"
