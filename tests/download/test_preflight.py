"""What a download will fetch and where it goes, looked at before."""

from __future__ import annotations

import json
import os
import shutil
import types
from pathlib import Path

import hub
import moto_server
import pytest
from plugins_for_tests import run_script

from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.download import preflight
from rayserve_hooks.errors import DownloadError

ALL = NodeModelDownloadable.MODEL_AND_TOKENIZER
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{...}",
    "model.safetensors": b"x" * 1000,
    "hash": b"1",
}


def test_a_bucket_is_listed_and_read(moto: str) -> None:
    moto_server.fill(moto, "models", {f"tiny/{path}": body for path, body in FILES.items()})
    found = preflight.look_at_bucket("s3://models/tiny", ALL)
    assert found == preflight.Wanted("s3://models/tiny", 3, 1007)
    tokenizer = preflight.look_at_bucket("s3://models/tiny", NodeModelDownloadable.TOKENIZER_ONLY)
    assert (tokenizer.files, tokenizer.size) == (2, 7)


def test_a_bucket_that_is_not_there(moto: str) -> None:
    with pytest.raises(DownloadError, match=r"^cannot list s3://models/tiny: .*; check "):
        preflight.look_at_bucket("s3://models/tiny", ALL)


def test_a_bucket_without_what_the_mode_selects(moto: str) -> None:
    moto_server.fill(moto, "models", {"tiny/hash": b"1", "tiny/weights.bin": b"x"})
    text = "^s3://models/tiny has 1 objects, none of which TOKENIZER_ONLY selects; check the path"
    with pytest.raises(DownloadError, match=text):
        preflight.look_at_bucket("s3://models/tiny", NodeModelDownloadable.TOKENIZER_ONLY)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("org/tiny", "['org/tiny' of the Hugging Face Hub, 2, 1002]"),
        (
            "org/other",
            (
                "cannot list 'org/other' of the Hugging Face Hub: Repository not found; check the "
                "id, HF_TOKEN and whether it may read the model, HF_ENDPOINT and the network"
            ),
        ),
    ],
)
def test_the_hub_is_asked(
    model: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "hub" / "org" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    with hub.serving(tmp_path / "hub") as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        # In a process of its own, as huggingface_hub reads the variables when it is imported.
        said = run_script(f"""
            from rayserve_hooks.context import NodeModelDownloadable
            from rayserve_hooks.download.preflight import look_at_hub
            from rayserve_hooks.errors import DownloadError
            try:
                found = look_at_hub({model!r}, NodeModelDownloadable.MODEL_AND_TOKENIZER)
                print(f"[{{found.where}}, {{found.files}}, {{found.size}}]")
            except DownloadError as error:
                print(error)
        """)
    assert said == expected


def test_a_place_is_looked_at_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "not" / "there"))
    usage = types.SimpleNamespace(free=7)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    place = preflight.place_of("org/tiny")
    assert place.folder == tmp_path / "not" / "there" / "models--org--tiny"
    assert (place.free, place.held, place.problem) == (7, 0, "")
    assert place.file_system
    assert list(tmp_path.iterdir()) == []


def test_what_the_cache_holds_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--tiny" / "snapshots"
    folder.mkdir(parents=True)
    (folder / "one").write_bytes(b"x" * 8192)
    os.link(folder / "one", folder / "two")
    (folder / "three").symlink_to("one")
    assert preflight.place_of("tiny").held == 8192


def test_a_place_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file"))
    assert preflight.place_of("tiny").problem == f"{str(tmp_path / 'file')!r} is no folder"


def test_a_place_that_others_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    place = preflight.place_of("tiny")
    assert place.problem == f"{str(tmp_path)!r} cannot be written by user {os.geteuid()}"


def test_importing_it_is_light() -> None:
    heavy = ["boto3", "huggingface_hub", "obstore", "ray"]
    script = f"""
        import json, sys
        import rayserve_hooks.download.preflight
        print(json.dumps(sorted(set({heavy}) & set(sys.modules))))
    """
    assert json.loads(run_script(script)) == []
