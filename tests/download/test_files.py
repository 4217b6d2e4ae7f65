"""What callbacks call to bring files."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import moto_server
import pytest
import s3
from test_cache import held, put
from users import ALICE, needs_root

from rayserve_hooks.download.files import download_files, list_folders, new_folder
from rayserve_hooks.download.safe_files import own_folder
from rayserve_hooks.errors import DownloadError

FILES = {"a.txt": "A", "sub/b.txt": "B", "sub/deep/c.txt": "C"}


@pytest.fixture(autouse=True)
def _clean(clean: None) -> None:
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return put(tmp_path / "buckets" / "bucket", FILES)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Server]:
    with s3.serving(folder.parent) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


def found(target: Path) -> dict[str, str]:
    return {name: text for name, text in held(target).items() if ".rayserve_hooks" not in name}


@pytest.mark.parametrize("store", ["s3://anonymous@bucket", "gs://anonymous@bucket", "file"])
def test_a_folder_and_one_object(
    store: str, server: s3.Server, folder: Path, tmp_path: Path
) -> None:
    uri, target = folder.as_uri() if store == "file" else store, tmp_path / "target"
    download_files(f"{uri}/sub", target)
    assert found(target) == {"b.txt": "B", "deep/c.txt": "C"}
    download_files(f"{uri}/a.txt", target / "renamed.txt")
    download_files(f"{uri}/a.txt", f"{target}/kept/")
    assert found(target) == {
        "b.txt": "B",
        "deep/c.txt": "C",
        "renamed.txt": "A",
        "kept/a.txt": "A",
    }


def test_a_server_that_nobody_here_wrote(moto: str, tmp_path: Path) -> None:
    moto_server.fill(moto, "bucket", {"sub/a b#?.txt": b"A", "sub/a b#?.txt2": b"other"})
    download_files("s3://bucket/sub/a b#?.txt", tmp_path / "x.txt")
    assert (tmp_path / "x.txt").read_text() == "A"
    with pytest.raises(DownloadError, match="holds no object"):
        download_files("s3://bucket/sub/a", tmp_path / "y.txt")


def test_an_object_is_replaced_when_it_changes(server: s3.Server, folder: Path) -> None:
    target = folder.parents[1] / "target" / "x.txt"
    download_files("s3://anonymous@bucket/a.txt", target)
    put(folder, {"a.txt": "changed"})
    download_files("s3://anonymous@bucket/a.txt", target)
    assert target.read_text() == "changed"


def test_an_object_that_is_damaged_leaves_nothing(server: s3.Server, tmp_path: Path) -> None:
    server.faults = [s3.Fault("corrupt", "a.txt")]
    with pytest.raises(DownloadError, match=r"a\.txt"):
        download_files("s3://anonymous@bucket/a.txt", tmp_path / "x.txt")
    assert not (tmp_path / "x.txt").exists()


@pytest.mark.parametrize("uri", ["s3://anonymous@bucket/nothing", "s3://anonymous@bucket/nothing/"])
def test_what_is_not_there(uri: str, server: s3.Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=f"^{uri} holds no object; check bucket and path$"):
        download_files(uri, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_folders_that_hold_a_file(server: s3.Server, folder: Path) -> None:
    files = ["loras/one/x.json", "loras/two/x.json", "loras/x.json", "loras/three/deep/x.json"]
    put(folder, dict.fromkeys([*files, "loras/four/y.json"], "{}"))
    assert list_folders("s3://anonymous@bucket/loras", "x.json") == ["one", "two"]


def test_a_new_folder_is_complete_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "above" / "target"
    with contextlib.suppress(KeyError), new_folder(target) as part:
        assert part is not None
        (part / "half.txt").write_text("half")
        raise KeyError("x")
    assert list(target.parent.iterdir()) == []
    with new_folder(target) as part:
        assert part is not None
        (part / "whole.txt").write_text("whole")
        assert not target.exists()
    assert list(target.parent.iterdir()) == [target]
    with new_folder(target) as part:
        assert part is None


def test_a_new_folder_is_filled_once(tmp_path: Path) -> None:
    filled = []

    def fill() -> None:
        with new_folder(tmp_path / "target") as part:
            if part is not None:
                filled.append(part)

    threads = [threading.Thread(target=fill) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(filled) == 1


def test_a_new_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match=r"^cannot write .*, or name another folder$"):  # noqa: SIM117
        with new_folder(tmp_path / "file" / "target"):
            pytest.fail("it is not there")


class TestOwnFolder:
    def test_it_is_made_for_this_user_alone(self, tmp_path: Path) -> None:
        own_folder(tmp_path / "a" / "b", way_out="wait")
        for folder in (tmp_path / "a", tmp_path / "a" / "b"):
            assert folder.stat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("name", ["a", "a/b"])
    def test_others_may_not_write_it_nor_the_one_above(self, name: str, tmp_path: Path) -> None:
        own_folder(tmp_path / "a" / "b", way_out="wait")
        (tmp_path / name).chmod(0o757)
        text = rf"^'.*/{name}' can be written by others \(mode 0o757\); remove it, or wait$"
        with pytest.raises(DownloadError, match=text):
            own_folder(tmp_path / "a" / "b", way_out="wait")

    def test_a_sticky_folder_above_will_do(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a").chmod(0o1777)
        own_folder(tmp_path / "a" / "b", way_out="wait")

    def test_a_link_of_ours_on_the_way_will_do(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        own_folder(tmp_path / "link" / "b", way_out="wait")
        assert (tmp_path / "real" / "b").is_dir()

    def test_a_file_in_its_place(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("")
        with pytest.raises(NotADirectoryError, match=r"a'$"):
            own_folder(tmp_path / "a", way_out="wait")

    @needs_root
    def test_another_users_link_leads_nowhere(self, tmp_path: Path) -> None:
        (tmp_path / "ours").mkdir()
        (tmp_path / "link").symlink_to("ours")
        os.chown(tmp_path / "link", ALICE, ALICE, follow_symlinks=False)
        with pytest.raises(DownloadError, match=rf"link' belongs to user {ALICE} and not to"):
            own_folder(tmp_path / "link", way_out="wait")
