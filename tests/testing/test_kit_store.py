"""Downloads of simulated starts: from a folder, and from a store on loopback."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.testing import ModelConfig, RunStack, ServeModels

pytestmark = pytest.mark.usefixtures("clean")  # no settings of this machine's own stores


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    (folder / "tiny").mkdir(parents=True)
    (folder / "tiny" / "config.json").write_text("{}")
    (folder / "tiny" / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tiny" / "model.safetensors").write_bytes(bytes(range(256)) * 4096)
    return folder


def digest(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


def test_a_folder_is_downloaded(run_stack: RunStack, models: Path) -> None:
    outcome = run_stack(config=ModelConfig(model_source=models / "tiny"), nodes=2)
    outcome.assert_succeeded()
    assert digest(Path(outcome.model_path)) == digest(models / "tiny")


def test_a_store_is_downloaded_once(
    run_stack: RunStack, models: Path, serve_models: ServeModels
) -> None:
    store = serve_models(models)
    outcome = run_stack(config=ModelConfig(model_source=store.uri("tiny")), nodes=2)
    outcome.assert_succeeded()
    assert digest(Path(outcome.model_path)) == digest(models / "tiny")
    assert "LIST tiny/" in store.requests
    assert "GET tiny/config.json" in store.requests


def test_a_mode_counts(run_stack: RunStack, models: Path, serve_models: ServeModels) -> None:
    class NoWeights:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            ctx.local_node_download_model = "EXCLUDE_SAFETENSORS"

    store = serve_models(models)
    outcome = run_stack([NoWeights], ModelConfig(model_source=store.uri("tiny")))
    outcome.assert_succeeded()
    assert sorted(digest(Path(outcome.model_path))) == ["config.json", "tokenizer.json"]


@pytest.mark.parametrize(("status", "text"), [(403, "403"), (404, "404")])
def test_a_store_that_refuses(
    status: int, text: str, run_stack: RunStack, models: Path, serve_models: ServeModels
) -> None:
    store = serve_models(models)
    store.refused["model.safetensors"] = status
    outcome = run_stack(config=ModelConfig(model_source=store.uri("tiny")))
    error = outcome.assert_failed(text)
    assert error.phase == "download"


def test_a_path_that_holds_nothing(
    run_stack: RunStack, serve_models: ServeModels, models: Path
) -> None:
    store = serve_models(models)
    outcome = run_stack(config=ModelConfig(model_source=store.uri("other")))
    outcome.assert_failed("other")
