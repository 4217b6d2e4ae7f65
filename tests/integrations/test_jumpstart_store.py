import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3
from jumpstart_store import JumpStartModel

from rayserve_hooks import CallbackCtx, Handled

BUCKET = "s3://anonymous@hub"
MODELS = {"meta-tiny": ["1.2.0", "1.10.0"], "other": ["3.0.0"]}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, clean: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Server]:
    """Return a store with a manifest, a spec for each version, and its files, as JumpStart's."""
    root = tmp_path / "buckets" / "hub"
    manifest = []
    for model_id, versions in MODELS.items():
        for version in versions:
            spec = f"specs/{model_id}/specs_v{version}.json"
            files = f"artifacts/{model_id}/{version}/"
            manifest.append({"model_id": model_id, "version": version, "spec_key": spec})
            (root / spec).parent.mkdir(parents=True, exist_ok=True)
            (root / spec).write_text(json.dumps({"hosting_artifact_key": files}))
            (root / files).mkdir(parents=True)
            (root / files / "config.json").write_text(version)
    (root / "models_manifest.json").write_text(json.dumps(manifest))
    with s3.serving(tmp_path / "buckets") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


def run(folder: Path, model_id: str, version: str = "*") -> Handled:
    callback, ctx = (
        JumpStartModel(BUCKET, model_id, str(folder), version),
        CallbackCtx(llm_config=0),
    )
    callback.on_before_init(ctx)
    return callback.on_before_download(ctx)


@pytest.mark.parametrize(("version", "expected"), [("*", "1.10.0"), ("1.2.0", "1.2.0")])
def test_the_version_is_the_newest_or_the_one_asked_for(
    version: str, expected: str, tmp_path: Path
) -> None:
    handled = run(tmp_path / "models", "meta-tiny", version)
    folder = tmp_path / "models" / "meta-tiny" / expected
    assert handled == Handled(folder, f"meta-tiny {expected} of {BUCKET}")
    assert (folder / "config.json").read_text() == expected


@pytest.mark.parametrize(
    ("model_id", "version", "has"),
    [("nope", "*", "none at all"), ("meta-tiny", "9", "1.10.0, 1.2.0")],
)
def test_what_is_not_there_is_said(model_id: str, version: str, has: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"has no '{model_id}' of version '.*'; it has {has}$"):
        run(tmp_path / "models", model_id, version)
