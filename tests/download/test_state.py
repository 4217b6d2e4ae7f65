"""State files that are damaged in any way cost a check or a download, and no more."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cache import FIRST, SECOND, end_uses, get, held, put

from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.download import state
from rayserve_hooks.download.state import Log, Manifest, Record
from rayserve_hooks.errors import DownloadError

TOKENIZER = NodeModelDownloadable.TOKENIZER_ONLY


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("RAYSERVE_HOOKS_LOCK_DIR", str(tmp_path / "locks"))
    yield tmp_path / "hub" / "models--org--tiny"
    end_uses()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return put(tmp_path / "store", FIRST)


def record(**changes: Any) -> dict[str, Any]:
    right = {"path": "a", "size": 1, "version": "v", "mtime_ns": 2, "checksum": "md5:1"}
    return {**right, "verified": "size", **changes}


def in_manifest(**changes: Any) -> str:
    content = {"source": "key", "revision": "r", "revision_version": None}
    return json.dumps({**content, "files": [record()], **changes})


class TestParsing:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        files = {"a": Record(**record()), "b/c": Record(**record(path="b/c", checksum=None))}
        manifest = Manifest(tmp_path / "m.json", "key", "r", "v", files)
        manifest.write("s3://bucket", tmp_path / "state")
        assert Manifest.read(tmp_path / "m.json") == manifest
        before = (tmp_path / "m.json").stat().st_ino
        manifest.write("s3://bucket", tmp_path / "state")
        assert (tmp_path / "m.json").stat().st_ino == before

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "1" * 5000,
            "[" * 100_000,
            '{"a":' * 100_000,
            in_manifest(source=1),
            in_manifest(revision=None),
            in_manifest(files={}),
            in_manifest(files=[record(size="1"), record(mtime_ns=1.5), record(size=True)]),
            in_manifest(
                files=[record(path=path) for path in ("", "/a", "../a", "a/../../b", "\0")]
            ),
            in_manifest(
                files=[record(path="\ud800"), record(checksum=1), record(checksum="?:1"), 1]
            ),
        ],
    )
    def test_a_damaged_manifest_has_no_files(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "m.json").write_text(text)
        assert Manifest.read(tmp_path / "m.json").files == {}

    def test_of_a_damaged_log_the_right_lines_count(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        log = Log(path, "key")
        log.add(Record(**record(path="a")))
        log.close()
        with path.open("ab") as file:
            file.write(b"\xff\xfe\n" + b"[" * 100_000 + b"\n" + b'{"source": "key", "path": "half')
        log = Log(path, "key")
        log.add(Record(**record(path="b")))
        log.close()
        assert set(Log(path, "key").files) == {"a", "b"}
        assert Log(path, "another store").files == {}

    @pytest.mark.parametrize(("size", "mtime"), [(10**30, 1), (1, -(10**30))])
    def test_absurd_numbers_match_no_file(self, size: int, mtime: int, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("a")
        found = Record(**record(size=size, mtime_ns=mtime))
        assert not found.matches(str(tmp_path / "a"))


def folder(path: Path) -> None:
    path.mkdir()


def full_folder(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("x")


def link_to(path: Path) -> None:
    victim = path.parents[3] / "victim"
    victim.write_text("precious")
    path.symlink_to(victim)


def link_to_nothing(path: Path) -> None:
    path.symlink_to(path.parents[3] / "nothing")


def hard_link(path: Path) -> None:
    victim = path.parents[3] / "victim"
    victim.write_text("precious")
    os.link(victim, path)


def others_may_write(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0o666)


def absurd(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**43)


DAMAGES: list[Callable[[Path], Any]] = [
    folder,
    full_folder,
    os.mkfifo,
    link_to,
    link_to_nothing,
    hard_link,
    others_may_write,
    Path.touch,
    lambda path: path.write_bytes(b"\xff\x00\xfe"),
    lambda path: path.write_text("[" * 100_000),
    lambda path: path.write_text('{"files": [1, {"path": 1}], "source": 5}'),
    lambda path: path.write_text("9" * 10_000),
    absurd,
]


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("damage", DAMAGES)
class TestDamaged:
    @pytest.mark.parametrize(
        "place",
        [
            "refs/main",
            ".rayserve_hooks/revisions/{}.json",
            ".rayserve_hooks/revisions/{}.used",
            ".rayserve_hooks/stage.jsonl",
        ],
    )
    def test_a_file(
        self, place: str, damage: Callable[[Path], Any], store: Path, model: Path
    ) -> None:
        victim = model.parents[1] / "victim"
        first = get(store, TOKENIZER)
        path = model / place.format(first.name)
        for _ in range(2):
            end_uses()
            remove(path)
            remove(victim)
            damage(path)
            assert held(get(store, TOKENIZER)) in (FIRST, {k: FIRST[k] for k in held(first)})
            assert held(get(store)) == FIRST
            assert (model / "refs" / "main").read_text() == first.name
        put(store, SECOND)
        assert held(get(store)) == SECOND
        assert not victim.exists() or victim.read_text() == "precious"
        assert not (model.parents[1] / "nothing").exists()

    @pytest.mark.parametrize("place", ["", "/stage", "/partial", "/revisions"])
    def test_a_folder(
        self, place: str, damage: Callable[[Path], Any], store: Path, model: Path
    ) -> None:
        get(store)
        path = model / f".rayserve_hooks{place}"
        link = damage in (link_to, link_to_nothing)
        for files in (SECOND, FIRST):
            put(store, files)
            remove(path)
            remove(model.parents[1] / "victim")
            damage(path)
            if not link:
                assert held(get(store)) == files
                continue
            for _ in range(2):
                with pytest.raises(DownloadError, match=r"is a link, or belongs to .*; remove it"):
                    get(store)
        assert not (model.parents[1] / "nothing").exists()


def test_a_lock_that_is_no_file_is_named(store: Path, model: Path) -> None:
    (model / ".rayserve_hooks" / "lock" / "sub").mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(DownloadError, match=r"lock' is a folder .*; remove it, or set HF_HOME"):
            get(store)


def test_a_planted_stage_leads_nowhere(store: Path, model: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b.json").write_text("precious")
    stage = model / ".rayserve_hooks" / "stage"
    stage.mkdir(parents=True)
    (stage / "gone").symlink_to(outside)
    (stage / "config.json").symlink_to(outside / "new")
    os.link(outside / "b.json", stage / "tokenizer.json")
    assert held(get(store)) == FIRST
    assert held(outside) == {"b.json": "precious"}


def test_a_planted_snapshot_is_replaced_and_what_it_leads_to_stays(
    store: Path, model: Path, tmp_path: Path
) -> None:
    put(store, FIRST, "one")
    outside = put(tmp_path / "outside", {"config.json": "precious", "mine": "precious"})
    (model / "snapshots").mkdir(parents=True)
    (model / "snapshots" / "one").symlink_to(outside)
    snapshot = get(store)
    assert not snapshot.is_symlink()
    assert held(outside) == {"config.json": "precious", "mine": "precious"}


def test_a_file_in_the_place_of_the_snapshot(store: Path, model: Path) -> None:
    put(store, FIRST, "one")
    (model / "snapshots").mkdir(parents=True)
    (model / "snapshots" / "one").write_text("x")
    assert held(get(store)) == FIRST


def test_a_manifest_that_leads_out_deletes_nothing(
    store: Path, model: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    first = get(store)
    manifest = model / ".rayserve_hooks" / "revisions" / f"{first.name}.json"
    content = json.loads(manifest.read_text())
    content["files"] += [record(path="../../../../victim"), record(path=str(victim))]
    manifest.write_text(json.dumps(content))
    for name, text in (("a", "1"), ("b", "2"), ("c", "3")):
        put(store, {name: text})
        get(store)
    assert victim.read_text() == "precious"
    assert not first.exists()


def test_a_hash_that_a_manifest_makes_up_names_nothing(
    store: Path, model: Path, tmp_path: Path
) -> None:
    put(store, FIRST, "one")
    first = get(store)
    manifest = model / ".rayserve_hooks" / "revisions" / "one.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "revision": "../../../evil"}))
    assert get(store) == first


def test_records_of_another_user_who_may_write_here_are_looked_at(store: Path, model: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    first = get(store)
    manifest = model / ".rayserve_hooks" / "revisions" / f"{first.name}.json"
    os.chown(manifest, 12345, 12345)
    assert get(store) == first
    put(store, SECOND)
    assert held(get(store)) == SECOND


def test_a_folder_of_another_user_is_refused(store: Path, model: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give folders away")
    (model / ".rayserve_hooks" / "stage").mkdir(parents=True)
    os.chown(model / ".rayserve_hooks" / "stage", 12345, 12345)
    with pytest.raises(DownloadError, match="belongs to user 12345, who could exchange what is"):
        get(store)


@pytest.mark.parametrize("place", ["", "snapshots", "refs", "{}", "{}/revisions", "{}/stage"])
def test_a_folder_that_another_user_has_linked_is_refused(
    place: str, store: Path, model: Path, tmp_path: Path
) -> None:
    if os.geteuid():
        pytest.skip("only root can give links away")
    path, outside = model / place.format(".rayserve_hooks"), tmp_path / "outside"
    outside.mkdir()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(outside)
    os.lchown(path, 12345, 12345)
    for _ in range(2):
        with pytest.raises(
            DownloadError, match=f"^'{path}' is a link.*; remove it, or set HF_HOME"
        ):
            get(store)
    assert list(outside.iterdir()) == []
    path.unlink()
    assert held(get(store)) == FIRST


@pytest.mark.parametrize("place", ["", "snapshots", "refs"])
def test_a_folder_that_this_user_has_linked_will_do(
    place: str, store: Path, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    (model / place).parent.mkdir(parents=True, exist_ok=True)
    (model / place).symlink_to(tmp_path / "outside")
    assert held(get(store)) == FIRST


def test_written_files_have_names_nobody_can_guess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "written-1").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr("secrets.token_hex", lambda _: "1")
    with pytest.raises(FileExistsError):
        state.write_if_changed(tmp_path / "file", "text", tmp_path)
    assert not (tmp_path / "elsewhere").exists()
