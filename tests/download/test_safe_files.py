from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from users import ALICE, BOB, common_folder, needs_root, run_as

from rayserve_hooks.download.safe_files import open_owned, private_folder, shared_folder
from rayserve_hooks.errors import DownloadError

WAY_OUT = "set HF_HOME to move the cache"
READ, WRITE, BOTH = os.O_RDONLY, os.O_WRONLY, os.O_RDWR
ME = os.geteuid()


@pytest.fixture(autouse=True)
def _no_descriptor_left() -> Iterator[None]:
    before = len([*Path("/proc/self/fd").iterdir()])
    yield
    assert len([*Path("/proc/self/fd").iterdir()]) == before


@pytest.fixture
def common() -> Iterator[Path]:
    with common_folder() as folder:
        yield folder


def refused(text: str) -> pytest.RaisesExc[DownloadError]:
    return pytest.raises(DownloadError, match=f"^{re.escape(text)}$")


def used(fd: int) -> os.stat_result:
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def dangling(path: Path, victim: Path) -> None:
    path.symlink_to(victim.with_name("new"))


def pipe(path: Path, _victim: Path) -> None:
    os.mkfifo(path)


def folder(path: Path, _victim: Path) -> None:
    path.mkdir()


def hard_link(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


def a_socket(path: Path, _victim: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


PLANTED = [
    (link, f"is a symbolic link of user {ME} and no file"),
    (dangling, f"is a symbolic link of user {ME} and no file"),
    (pipe, f"is a named pipe of user {ME} and no file"),
    (folder, f"is a folder of user {ME} and no file"),
    (hard_link, f"is a file of user {ME} with 2 names (hard links)"),
    (a_socket, f"is a socket of user {ME} and no file"),
]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "flags", [READ, WRITE, BOTH, BOTH | os.O_CREAT, WRITE | os.O_CREAT | os.O_TRUNC]
)
@pytest.mark.parametrize(("plant", "problem"), PLANTED)
@pytest.mark.timeout(10)  # opening a pipe would wait for its other end
def test_what_is_no_file_of_its_own_is_refused(
    tmp_path: Path, plant: Callable[[Path, Path], None], problem: str, flags: int, shared: bool
) -> None:
    victim, path = tmp_path / "victim", tmp_path / "planted"
    victim.write_text("precious")
    plant(path, victim)
    with refused(f"{str(path)!r} {problem}; remove it, or {WAY_OUT}"):
        open_owned(path, flags, way_out=WAY_OUT, shared=shared)
    assert victim.read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == [path, victim]


def test_an_error_names_the_whole_path(tmp_path: Path) -> None:
    (tmp_path / "name").mkdir()
    fd = os.open(tmp_path, os.O_PATH)
    text = f"'{tmp_path}/name' is a folder of user {ME} and no file; remove it, or {WAY_OUT}"
    with refused(text):
        open_owned("name", READ, way_out=WAY_OUT, dir_fd=fd)
    os.close(fd)


def test_a_new_file_has_the_mode_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert used(open_owned(path, BOTH | os.O_CREAT, way_out=WAY_OUT)).st_mode & 0o777 == 0o600
    fd = open_owned(tmp_path / "other", BOTH | os.O_CREAT, 0o640, way_out=WAY_OUT)
    assert not os.get_inheritable(fd)
    assert used(fd).st_mode & 0o777 == 0o640


def test_an_existing_file_is_kept_unless_it_is_to_be_truncated(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    assert used(open_owned(path, BOTH | os.O_CREAT, way_out=WAY_OUT)).st_size == 4
    assert used(open_owned(path, BOTH | os.O_TRUNC, way_out=WAY_OUT)).st_size == 0


def test_what_the_caller_explains_stays_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_owned(tmp_path / "file", BOTH, way_out=WAY_OUT)
    with pytest.raises(FileNotFoundError):
        open_owned(tmp_path / "none" / "file", BOTH | os.O_CREAT, way_out=WAY_OUT)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        open_owned(tmp_path / "file", BOTH | os.O_CREAT | os.O_EXCL, way_out=WAY_OUT)


def test_a_file_that_others_may_write_is_accepted_in_a_shared_folder_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(0o664)
    text = f"'{path}' of user {ME} can be written by others (mode 0o664); remove it, or {WAY_OUT}"
    with refused(text):
        open_owned(path, BOTH, way_out=WAY_OUT)
    assert used(open_owned(path, BOTH, way_out=WAY_OUT, shared=True)).st_mode & 0o777 == 0o664


def test_a_file_that_vanishes_while_it_is_opened_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = tmp_path / "file", os.open
    path.touch()

    def remove_first(*args: object, **kwargs: object) -> int:
        try:
            return opened(*args, **kwargs)  # type: ignore[arg-type]
        except FileExistsError:
            path.unlink()
            raise

    monkeypatch.setattr(os, "open", remove_first)
    used(open_owned(path, BOTH | os.O_CREAT, way_out=WAY_OUT))
    assert path.exists()


@needs_root
def test_a_file_of_another_user_is_accepted_in_a_shared_folder_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.chown(path, BOB, BOB)
    text = f"'{path}' belongs to user {BOB} and not to {ME}; remove it, or {WAY_OUT}"
    with refused(text):
        open_owned(path, BOTH, way_out=WAY_OUT)
    assert used(open_owned(path, BOTH, way_out=WAY_OUT, shared=True)).st_uid == BOB


@pytest.mark.parametrize(
    ("folder", "file", "accepted"),
    [
        (0o777, 0o777, True),  # as on a mount that has one mode for all
        (0o775, 0o664, True),
        (0o775, 0o666, False),
        (0o1777, 0o666, False),  # nobody else can replace a file in a sticky folder
        (0o1777, 0o644, True),
    ],
)
def test_those_may_write_a_file_who_can_replace_it(
    tmp_path: Path, folder: int, file: int, accepted: bool
) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.touch()
    path.chmod(file)
    path.parent.chmod(folder)
    fd = os.open(path.parent, os.O_PATH)
    for name, dir_fd in ((str(path), None), ("file", fd)):
        if accepted:
            used(open_owned(name, BOTH, way_out=WAY_OUT, dir_fd=dir_fd))
        else:
            with pytest.raises(DownloadError, match=rf" can be written by others \(mode {file:#o}"):
                open_owned(name, BOTH, way_out=WAY_OUT, dir_fd=dir_fd)
    os.close(fd)


@needs_root
def test_a_group_that_may_not_write_the_folder_may_not_write_its_files(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.touch()
    path.chmod(0o664)
    path.parent.chmod(0o775)
    used(open_owned(path, BOTH, way_out=WAY_OUT))
    os.chown(path, -1, BOB)
    with pytest.raises(DownloadError, match=r" can be written by others \(mode 0o664\); "):
        open_owned(path, BOTH, way_out=WAY_OUT)


@needs_root
def test_a_file_of_the_folders_owner_is_accepted(tmp_path: Path) -> None:
    # NFS that maps root to nobody: what root has made, and its folder, are another user's.
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.touch()
    for made in (path, path.parent):
        os.chown(made, BOB, BOB)
    assert used(open_owned(path, BOTH, way_out=WAY_OUT)).st_uid == BOB


@needs_root
def test_a_file_of_root_is_accepted_everywhere(common: Path) -> None:
    path = common / "file"
    path.touch(0o644)
    script = """
import sys
from rayserve_hooks.download.safe_files import open_owned
become()
fd = open_owned(sys.argv[1], os.O_RDONLY, way_out="-")
print(os.geteuid(), os.fstat(fd).st_uid)
"""
    assert run_as(ALICE, script, path) == f"{ALICE} 0\n"


def test_a_private_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    status = used(private_folder(tmp_path / "folder", way_out=WAY_OUT))
    assert (status.st_mode & 0o7777, status.st_uid) == (0o700, ME)
    (tmp_path / "folder").chmod(0o777)
    assert used(private_folder(tmp_path / "folder", way_out=WAY_OUT)).st_mode & 0o7777 == 0o700


@pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (link, "a symbolic link"),
        (pipe, "a named pipe"),
        (hard_link, "a file"),
        (a_socket, "a socket"),
    ],
)
@pytest.mark.parametrize("make", [private_folder, shared_folder])
def test_what_is_no_folder_is_refused(
    tmp_path: Path, make: Callable[..., int], plant: Callable[[Path, Path], None], kind: str
) -> None:
    victim, path = tmp_path / "victim", tmp_path / "planted"
    victim.touch()
    plant(path, victim)
    text = f"'{path}' is {kind} of user {ME} and no folder; remove it, or {WAY_OUT}"
    with refused(text):
        make(path, way_out=WAY_OUT)


def test_a_private_folder_is_no_link_to_a_folder_either(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir(mode=0o755)
    path = tmp_path / "link"
    path.symlink_to("folder")
    text = f"'{path}' is a symbolic link of user {ME} and no folder; remove it, or {WAY_OUT}"
    with refused(text):
        private_folder(path, way_out=WAY_OUT)
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


@needs_root
def test_a_private_folder_belongs_to_no_other_user(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir(mode=0o755)
    os.chown(tmp_path / "folder", BOB, BOB)
    text = f"'{tmp_path}/folder' belongs to user {BOB} and not to {ME}; remove it, or {WAY_OUT}"
    with refused(text):
        private_folder(tmp_path / "folder", way_out=WAY_OUT)
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


def test_a_shared_folder_is_opened_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    assert used(shared_folder(path, way_out=WAY_OUT)).st_mode & 0o777 == 0o700
    path.chmod(0o1777)
    assert used(shared_folder(path, way_out=WAY_OUT)).st_mode & 0o7777 == 0o1777
    mode = used(shared_folder(tmp_path / "c", 0o750, way_out=WAY_OUT)).st_mode
    assert mode & 0o777 == 0o750


def test_a_link_of_this_user_to_a_shared_folder_counts(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    assert used(shared_folder(tmp_path / "link", way_out=WAY_OUT)).st_ino == (
        (tmp_path / "folder").stat().st_ino
    )


@needs_root
def test_a_link_of_another_user_to_a_shared_folder_does_not(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / "link"
    path.symlink_to("folder")
    os.chown(path, BOB, BOB, follow_symlinks=False)
    text = f"'{path}' is a symbolic link of user {BOB} and no folder; remove it, or {WAY_OUT}"
    with refused(text):
        shared_folder(path, way_out=WAY_OUT)
