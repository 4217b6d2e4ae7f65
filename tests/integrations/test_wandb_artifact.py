import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import http_service
import pytest
import requests
from wandb_artifact import WandbArtifact

from rayserve_hooks import CallbackCtx, Handled

FILES = {"config.json": b"{}", "parts/model.safetensors": b"weights"}
LOGIN = "Basic " + base64.b64encode(b"api:secret-key").decode()
VERSIONS = {"production": 3, "v3": 3}


class Api:
    """The GraphQL API and its file store: fields and variables as the client 0.30 asks for them."""

    def __init__(self) -> None:
        self.url = ""
        self.damaged = False

    def answer(self, request: http_service.Request) -> Any:
        if request.path.startswith("/files/"):  # signed URLs, which need no key
            assert "Authorization" not in request.headers
            held = FILES[request.path.removeprefix("/files/")]
            return held[:-1] if self.damaged else held
        assert request.path == "/graphql"
        if request.headers["Authorization"] != LOGIN:
            return 401
        asked = json.loads(request.body)["variables"]
        version = VERSIONS[asked["alias"]]
        assert (asked["entity"], asked["project"]) == ("team", "project")
        assert asked["collection"] == "tiny"
        # A page for each file.
        first = int(asked["cursor"] or 0)
        path, held = list(FILES.items())[first]
        digest = base64.b64encode(hashlib.md5(held).digest()).decode()
        node = {"displayName": path, "directUrl": f"{self.url}/files/{path}?sig=1", "md5": digest}
        info = {"endCursor": str(first + 1), "hasNextPage": first + 1 < len(FILES)}
        files = {"pageInfo": info, "edges": [{"node": node}]}
        membership = {"versionIndex": version, "files": files}
        return {"data": {"project": {"artifactCollection": {"artifactMembership": membership}}}}


@pytest.fixture
def api(clean: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    api = Api()
    with http_service.serving(api.answer) as service:
        api.url = service.url
        monkeypatch.setenv("WANDB_BASE_URL", service.url)
        monkeypatch.setenv("WANDB_API_KEY", "secret-key")
        yield api


def run(folder: Path) -> Handled:
    callback = WandbArtifact("team/project/tiny", "production", str(folder))
    ctx = CallbackCtx(llm_config=None)
    callback.on_before_init(ctx)
    assert ctx.custom_data == {"wandb": "v3"}
    return callback.on_before_download(ctx)


def test_all_pages_of_the_version_are_there(api: Api, tmp_path: Path) -> None:
    target = tmp_path / "team/project/tiny/v3"
    for _ in range(2):
        assert run(tmp_path) == Handled(target, f"{target} is of Weights & Biases")
    found = {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    assert found == FILES


def test_a_damaged_file_is_not_served(api: Api, tmp_path: Path) -> None:
    api.damaged = True
    with pytest.raises(OSError, match=r"^config\.json of the artifact is damaged; start again$"):
        run(tmp_path)
    assert list((tmp_path / "team/project/tiny").iterdir()) == []


def test_a_wrong_key(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "another-key")
    with pytest.raises(requests.HTTPError, match="401"):
        run(tmp_path)
