"""Files beside the model, in a folder that is somebody else's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cache import held, put
from test_state import DAMAGES, link_to, link_to_nothing, remove

from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.download.model import Mirror, download_node
from rayserve_hooks.download.state import Manifest, key_of
from rayserve_hooks.download.stores import open_source
from rayserve_hooks.errors import DownloadError

FILES = {"adapter.json": "{}", "sub/adapter.bin": "weights", "sub/deep/more.bin": "more"}
CHANGED = {"adapter.json": "[]", "sub/adapter.bin": "weights"}


@pytest.fixture(autouse=True)
def _own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSERVE_HOOKS_LOCK_DIR", str(tmp_path / "locks"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return put(tmp_path / "store", FILES)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    # As deep as a model's folder, for the damages.
    return tmp_path / "hub" / "target"


def get(store: Path, target: Path) -> dict[str, str]:
    mirror = Mirror(None, ((store.as_uri(), str(target)),))
    download_node("org/tiny", mirror, NodeModelDownloadable.NONE)
    return {k: v for k, v in held(target).items() if not k.startswith(".rayserve_hooks")}


def test_they_follow_the_store(store: Path, target: Path) -> None:
    assert get(store, target) == FILES
    put(store, CHANGED)
    assert get(store, target) == CHANGED
    state = target / ".rayserve_hooks"
    assert {path.suffix for path in state.iterdir() if path.name != "lock"} == {".json"}


def test_files_of_others_stay(store: Path, target: Path) -> None:
    put(target, {"mine.txt": "mine", "sub/mine.txt": "mine"})
    get(store, target)
    (target / "sub" / "deep" / "more.bin").write_text("edited by the user")
    put(store, CHANGED)
    mine = {"mine.txt": "mine", "sub/mine.txt": "mine", "sub/deep/more.bin": "edited by the user"}
    assert get(store, target) == CHANGED | mine


def test_a_change_on_disk_is_undone(store: Path, target: Path) -> None:
    get(store, target)
    (target / "adapter.json").write_text("damaged")
    assert get(store, target) == FILES


def test_asking_again_writes_nothing(store: Path, target: Path) -> None:
    get(store, target)
    before = {path: path.stat().st_mtime_ns for path in [target, *target.rglob("*")]}
    assert get(store, target) == FILES
    assert {path: path.stat().st_mtime_ns for path in [target, *target.rglob("*")]} == before


def test_a_killed_run_s_files_are_known(
    store: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            get(store, target)
    put(store, CHANGED)
    assert get(store, target) == CHANGED


@pytest.mark.parametrize(
    ("blocked", "by"), [("adapter.json/x", "a folder of that name is in the way"), ("sub", "")]
)
def test_what_is_in_the_way_is_named(blocked: str, by: str, store: Path, target: Path) -> None:
    put(target, {blocked: "mine"})
    for _ in range(2):
        with pytest.raises(DownloadError, match=f"^cannot write '.*'.*: .*{by}"):
            get(store, target)
    assert (target / blocked).read_text() == "mine"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_damaged_records_cost_a_download_and_no_more(
    suffix: str, damage: Callable[[Path], Any], store: Path, target: Path
) -> None:
    get(store, target)
    key = key_of(open_source(store.as_uri()))
    path = target / ".rayserve_hooks" / f"extra-{key[:12]}.{suffix}"
    for files in (FILES, CHANGED):
        put(store, files)
        remove(path)
        remove(target.parents[1] / "victim")
        damage(path)
        found = get(store, target)
        # Of what is not known to be ours, nothing is removed.
        assert {name: found[name] for name in files} == files
    victim = target.parents[1] / "victim"
    assert not victim.exists() or victim.read_text() in ("precious", "{}")
    assert not (target.parents[1] / "nothing").exists()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("place", [".rayserve_hooks", ".rayserve_hooks/partial"])
def test_what_is_in_the_place_of_a_folder_of_ours(
    place: str, damage: Callable[[Path], Any], store: Path, target: Path
) -> None:
    get(store, target)
    put(store, CHANGED)
    remove(target / place)
    damage(target / place)
    if damage in (link_to, link_to_nothing):
        with pytest.raises(DownloadError, match="is a link, or belongs to"):
            get(store, target)
    else:
        found = get(store, target)
        assert {name: found[name] for name in CHANGED} == CHANGED
