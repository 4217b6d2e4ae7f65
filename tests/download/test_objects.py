from __future__ import annotations

from pathlib import Path

import moto_server
import pytest

from rayserve_hooks.download.objects import ObjectFolder
from rayserve_hooks.errors import DownloadError


def exercise(uri: str) -> None:
    """Write, list and read; what is there stays as it is."""
    with ObjectFolder(uri) as folder:
        assert folder.names() == []
        assert folder.create("a.archive", b"first")
        assert not folder.create("a.archive", b"second")
        assert folder.create("b.json", b"{}")
        assert sorted(folder.names()) == ["a.archive", "b.json"]
        assert folder.read("a.archive", 5) == b"first"
        with pytest.raises(DownloadError, match=r"has 5 bytes, but at most 4 are read; raise"):
            folder.read("a.archive", 4)
        with pytest.raises(DownloadError, match="cannot read 'c' of"):
            folder.read("c", 4)


def test_a_folder(tmp_path: Path) -> None:
    exercise(tmp_path.as_uri())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.archive", "b.json"]


def test_a_bucket_of_s3(moto: str) -> None:
    moto_server.fill(moto, "bucket", {"elsewhere/x": b"", "compile/below/y": b""})
    exercise("s3://bucket/compile")
    found = moto_server.client(moto).list_objects_v2(Bucket="bucket", Prefix="compile/")
    assert [each["Key"] for each in found["Contents"]] == [
        "compile/a.archive",
        "compile/b.json",
        "compile/below/y",
    ]


def test_a_bucket_that_is_not_there(moto: str) -> None:
    with (
        ObjectFolder("s3://nowhere/compile") as folder,
        pytest.raises(DownloadError, match="cannot list s3://nowhere/compile"),
    ):
        folder.names()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"gone is no folder; mount it, or make it$"):
        ObjectFolder((tmp_path / "gone").as_uri())
