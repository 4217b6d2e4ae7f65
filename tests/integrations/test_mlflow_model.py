from collections.abc import Iterator
from pathlib import Path
from typing import Any

import http_service
import pytest
import requests
from mlflow_model import MlflowModel

from rayserve_hooks import CallbackCtx, Handled

FILES: dict[str, Any] = {
    "MLmodel": b"flavors: {}",
    "model": {"config.json": b"{}", "model.safetensors": b"weights" * 1000},
}
API = "/api/2.0/mlflow"


class Registry:
    """MLflow's tracking server with one model; its paths, parameters and answers."""

    def __init__(self) -> None:
        self.source = "mlflow-artifacts:/1/models/m-1/artifacts"
        self.cut = False

    def answer(self, request: http_service.Request) -> Any:
        path, query = request.path, request.query
        if request.headers["Authorization"] != "Bearer secret-token":
            return 401
        if path == f"{API}/registered-models/alias":
            if query != {"name": "tiny", "alias": "champion"}:
                return 404
            return {"model_version": {"name": "tiny", "version": "7"}}
        if path == f"{API}/model-versions/get-download-uri":
            return {"artifact_uri": self.source} if query["version"] == "7" else 404
        root = f"{API}-artifacts/artifacts"
        if path == root:
            found = self._at(query["path"])
            files = [
                {"path": name, "is_dir": isinstance(held, dict), "file_size": len(held)}
                for name, held in found.items()
            ]
            return {"files": files}
        held = self._at(path.removeprefix(f"{root}/"))
        return held[: len(held) // 2] if self.cut else held

    @staticmethod
    def _at(path: str) -> Any:
        found: Any = FILES
        for name in filter(None, path.removeprefix("1/models/m-1/artifacts").split("/")):
            found = found[name]
        return found


@pytest.fixture
def registry(clean: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    registry = Registry()
    with http_service.serving(registry.answer) as service:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", service.url)
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret-token")
        yield registry


def run(folder: Path, alias: str = "champion") -> Handled:
    callback, ctx = MlflowModel("tiny", alias, str(folder)), CallbackCtx(llm_config=None)
    callback.on_before_init(ctx)
    assert "secret-token" not in repr(ctx.custom_data)
    return callback.on_before_download(ctx)


def test_the_server_hands_out_the_files(registry: Registry, tmp_path: Path) -> None:
    for _ in range(2):
        assert run(tmp_path) == Handled(tmp_path / "tiny/7/model", "tiny 7 of MLflow")
    weights = tmp_path / "tiny/7/model/model.safetensors"
    assert weights.read_bytes() == FILES["model"]["model.safetensors"]


def test_files_of_a_bucket_are_fetched_from_there(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "bucket" / "model").mkdir(parents=True)
    (tmp_path / "bucket" / "model" / "config.json").write_text("{}")
    registry.source = (tmp_path / "bucket").as_uri()
    assert run(tmp_path / "models").model_path == str(tmp_path / "models/tiny/7/model")
    assert (tmp_path / "models/tiny/7/model/config.json").read_text() == "{}"


def test_what_is_cut_off_is_not_served(registry: Registry, tmp_path: Path) -> None:
    registry.cut = True
    with pytest.raises(OSError, match=r"MLflow has sent a part of .* only; look at its log"):
        run(tmp_path)
    assert list((tmp_path / "tiny").iterdir()) == []


def test_an_alias_that_is_not_there(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(requests.HTTPError, match="404"):
        run(tmp_path, "nobody")
