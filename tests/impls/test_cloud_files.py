from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3
from plugins_for_tests import run_script

from rayserve_hooks.errors import CallbackConfigError
from rayserve_hooks.impls.cloud_files import CloudFiles
from rayserve_hooks.testing import Outcome, RunStack

FILES = {"extra/a.json": b"{}", "extra/sub/b.bin": b"b" * 1000, "single/c.txt": b"c"}


@pytest.fixture
def store(tmp_path: Path, clean: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Server]:
    for path, held in FILES.items():
        file = tmp_path / "buckets" / "bucket" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(held)
    with s3.serving(tmp_path / "buckets") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


def run(run_stack: RunStack, *paths: tuple[str, object], **options: Any) -> Outcome:
    pairs = [[f"s3://anonymous@bucket/{uri}", str(path)] for uri, path in paths]
    return run_stack({"callback": CloudFiles, "kwargs": {"paths": pairs}}, **options)


def test_folders_and_files_go_where_it_is_said(
    run_stack: RunStack, store: s3.Server, tmp_path: Path
) -> None:
    outcome = run(
        run_stack,
        ("extra", "$TARGET/extra"),
        ("single/c.txt", "$TARGET/d.txt"),
        ("single/c.txt", "$TARGET/"),
        environment={"TARGET": str(tmp_path / "there")},
    ).assert_succeeded()
    outcome.assert_order(["replica: on_before_download: CloudFiles"])  # which takes nothing over
    found = {
        str(path.relative_to(tmp_path / "there")): path.read_bytes()
        for path in (tmp_path / "there").rglob("*")
        if path.is_file() and ".rayserve_hooks" not in path.parts
    }
    assert found == {
        "extra/a.json": b"{}",
        "extra/sub/b.bin": b"b" * 1000,
        "d.txt": b"c",
        "c.txt": b"c",
    }


def test_asked_again_nothing_is_fetched(
    run_stack: RunStack, store: s3.Server, tmp_path: Path
) -> None:
    paths = [("extra", tmp_path / "extra"), ("single/c.txt", tmp_path / "d.txt")]
    run(run_stack, *paths).assert_succeeded()
    store.requests.clear()
    run(run_stack, *paths).assert_succeeded()
    assert {request.partition(" ")[0] for request in store.requests} == {"LIST"}


def test_what_is_damaged_on_its_way_is_an_error(
    run_stack: RunStack, store: s3.Server, tmp_path: Path
) -> None:
    store.faults = [s3.Fault("corrupt", "c.txt")]
    outcome = run(run_stack, ("single/c.txt", tmp_path / "d.txt"))
    outcome.assert_failed(callback="CloudFiles", hook="on_before_download")
    assert not (tmp_path / "d.txt").exists()


def test_a_bucket_that_is_gone(run_stack: RunStack, store: s3.Server, tmp_path: Path) -> None:
    outcome = run(run_stack, ("nothing", tmp_path / "x"))
    outcome.assert_failed("s3://anonymous@bucket/nothing holds no object; check ")


def test_a_folder_that_cannot_be_written(
    run_stack: RunStack, store: s3.Server, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = run(run_stack, ("extra", tmp_path / "file" / "x"))
    outcome.assert_failed("cannot write '.*/file.*'.*, or name another folder")


def test_a_secret_of_the_uri_is_not_shown(run_stack: RunStack, clean: None, tmp_path: Path) -> None:
    uri = "azure://c@a.blob.core.windows.net/x?sig=SECRETSECRET"
    outcome = run_stack(CloudFiles([(uri, str(tmp_path / "x"))]))
    error = outcome.assert_failed(callback="CloudFiles")
    assert "SECRETSECRET" not in f"{error}{error.__cause__!r}{outcome!r}{outcome.log}"


@pytest.mark.ray
def test_rays_own_arguments_are_taken_as_they_are() -> None:
    from ray.llm._internal.common.callbacks.cloud_downloader import CloudDownloader

    paths = [("s3://bucket/a/file.txt", "/local/file.txt"), ("gs://bucket/b", "relative/folder")]
    config: Any = object()
    CloudDownloader(llm_config=config, raise_error_on_callback=True, paths=paths)
    assert CloudFiles(paths=paths).paths == paths


SCHEMES = "write a URI of a store, with one of s3://, gs://, azure://, abfss://, file://"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, " has no argument 'paths'; add it"),
        ({"paths": []}, "(paths=[]): give at least one pair of a URI and a path"),
        ({"paths": [["/local", "/x"]]}, f"(paths[0][0]='/local'): {SCHEMES}"),
        ({"paths": [["http://host/x", "/x"]]}, f"(paths[0][0]='http://host/x'): {SCHEMES}"),
        ({"paths": [["s3://b/x", ""]]}, "(paths[0][1]=''): write the path on each node that"),
        ({"paths": [["s3://b/x"]]}, "(paths[0]) has no argument 1; add it"),
        ({"paths": "s3://b/x"}, "(paths='s3://b/x'): write a list, even of one item"),
        ({"path": []}, " has no argument 'paths'; add it"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(CallbackConfigError, match=re.escape(f"CloudFiles{text}")):
        CloudFiles(**arguments)


def test_importing_it_imports_nothing_heavy() -> None:
    code = """
        import sys, rayserve_hooks.impls.cloud_files
        print(sorted({"boto3", "obstore", "ray", "torch"} & set(sys.modules)))
    """
    assert run_script(code) == "[]"
