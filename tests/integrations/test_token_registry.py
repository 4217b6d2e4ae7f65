import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import http_service
import pytest
from token_registry import RegistryModel

from rayserve_hooks import CallbackCtx, Handled

FILES = {"config.json": b"{}", "parts/model.safetensors": b"weights"}


class Registry:
    def __init__(self) -> None:
        self.files = [
            {"path": path, "sha256": hashlib.sha256(held).hexdigest()}
            for path, held in FILES.items()
        ]

    def answer(self, request: http_service.Request) -> Any:
        if request.headers["Authorization"] != "Bearer secret-token":
            return 403
        if request.path == "/models/team/tiny":
            return {"version": "v2", "files": self.files}
        return FILES.get(request.path.removeprefix("/models/team/tiny/v2/"), 404)


@pytest.fixture
def registry(clean: None, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("REGISTRY_TOKEN", "secret-token")
    return Registry()


@pytest.fixture
def service(registry: Registry) -> Iterator[http_service.Service]:
    with http_service.serving(registry.answer) as service:
        yield service


def run(service: http_service.Service, folder: Path) -> Handled:
    callback, ctx = RegistryModel(service.url, "team/tiny", str(folder)), CallbackCtx(llm_config=0)
    callback.on_before_init(ctx)
    assert "secret-token" not in repr([vars(callback), ctx.custom_data])
    return callback.on_before_download(ctx)


def test_the_files_are_there_once(service: http_service.Service, tmp_path: Path) -> None:
    for _ in range(2):
        handled = run(service, tmp_path)
        assert handled == Handled(tmp_path / "team/tiny/v2", "team/tiny v2 of the registry")
    assert (tmp_path / "team/tiny/v2/parts/model.safetensors").read_bytes() == b"weights"
    assert len([asked for asked in service.requests if asked.endswith(".safetensors")]) == 1


def test_a_damaged_file_is_not_served(
    registry: Registry, service: http_service.Service, tmp_path: Path
) -> None:
    registry.files[1]["sha256"] = "0" * 64
    with pytest.raises(OSError, match=r"parts/model.safetensors of team/tiny is damaged"):
        run(service, tmp_path)
    assert list((tmp_path / "team/tiny").iterdir()) == []


def test_a_path_that_leaves_the_folder(
    registry: Registry, service: http_service.Service, tmp_path: Path
) -> None:
    registry.files[0]["path"] = "../../../stolen"
    with pytest.raises(ValueError, match=r"names '../../../stolen', outside of the model"):
        run(service, tmp_path)


def test_a_refused_token_is_named_and_not_shown(
    service: http_service.Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGISTRY_TOKEN", "another-token")
    with pytest.raises(PermissionError, match=r"refuses the token of REGISTRY_TOKEN$"):
        run(service, tmp_path)
