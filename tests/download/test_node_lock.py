from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from users import ALICE, BOB, common_folder, needs_root, run_as, start_as
from waiting import until

from rayserve_hooks.download import node_lock as module
from rayserve_hooks.download.caller import Caller
from rayserve_hooks.download.node_lock import (
    LOCK_DIR_VARIABLE,
    folder_lock,
    lock_reaches_other_nodes,
    node_lock,
    shared_lock_reaches_other_nodes,
)
from rayserve_hooks.errors import DownloadError

LOGGER = logging.getLogger("test")
CALLER = Caller(LOGGER)
ME = os.geteuid()
FOREVER = 30  # no test waits so long unless it fails
COMMON = (
    "set RAYSERVE_HOOKS_LOCK_DIR to a folder on a local disk that every user of the cache can write"
)
HOLDER = """
import logging, os, pathlib, sys, time
from rayserve_hooks.download.caller import Caller
from rayserve_hooks.download.node_lock import folder_lock, node_lock
with node_lock(pathlib.Path(sys.argv[1]), "weights of app/model", Caller(logging.getLogger())):
    child = FORK
    print("held", child, flush=True)
    sys.stdin.read()
"""
# A user takes a lock, says so, and gives it back at the end of its input.
USER = """
import logging, pathlib, sys, time
from rayserve_hooks.download import node_lock as module
from rayserve_hooks.download.caller import Caller
become()
module._REPORT_S, module._POLL_S, module._DENIED_S = 0.1, 0.02, 20
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(message)s")
os.umask(int(sys.argv[3], 8))
lock = getattr(module, sys.argv[1])
with lock(pathlib.Path(sys.argv[2]), f"model of {os.getuid()}", Caller(logging.getLogger())) as had:
    print("has it", had, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def lock_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(tmp_path / "locks"))
    monkeypatch.setattr(module, "_REPORT_S", 0.1)
    monkeypatch.setattr(module, "_POLL_S", 0.02)
    return tmp_path / "locks"


@pytest.fixture(autouse=True)
def _no_descriptor_left() -> Iterator[None]:
    before = len([*Path("/proc/self/fd").iterdir()])
    yield
    assert len([*Path("/proc/self/fd").iterdir()]) <= before


@pytest.fixture
def default_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the lock folder of this user that is used by default; not made yet."""
    monkeypatch.delenv(LOCK_DIR_VARIABLE)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    return tmp_path / f"rayserve_hooks-{ME}"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with hold(tmp_path) as process:
        yield process
        process.kill()


@pytest.fixture
def common() -> Iterator[Path]:
    with common_folder() as folder:
        yield folder


def hold(tmp_path: Path, fork: str = "None") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER.replace("FORK", fork), str(tmp_path / "model")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert line(process).startswith("held ")
    return process


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def finish(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)
    process.communicate()


@contextlib.contextmanager
def after_lines(
    count: int, action: Callable[[], object], caplog: pytest.LogCaptureFixture
) -> Iterator[list[str]]:
    """Yield the lines of the log; run the action at one of them."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            if len(lines) == count:
                action()

    lines: list[str] = []
    handler = Handler()
    LOGGER.addHandler(handler)
    try:
        with caplog.at_level(logging.DEBUG, LOGGER.name):
            yield lines
    finally:
        LOGGER.removeHandler(handler)


def locked(path: Path) -> None:
    with node_lock(path, "mine", CALLER):
        pass


def refused(text: str) -> pytest.RaisesExc[DownloadError]:
    return pytest.raises(DownloadError, match=f"^{re.escape(text)}$")


def lock_file(folder: Path) -> Path:
    (found,) = folder.glob("*.lock")
    return found


def test_a_waiting_process_says_for_whom(
    holder: subprocess.Popen[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with after_lines(2, lambda: finish(holder, signal.SIGTERM), caplog) as lines:
        locked(tmp_path / "model")
    assert len(lines) == 2
    pattern = (
        rf"{tmp_path}/model: waiting for pid {holder.pid} \(\S*python\S*: weights of app/model, "
        r"since \d\d:\d\d:\d\d\), \d s"
    )
    assert all(re.fullmatch(pattern, line) for line in lines), lines


def test_the_lock_of_a_crashed_owner_is_taken_over(
    holder: subprocess.Popen[str], tmp_path: Path, lock_dir: Path
) -> None:
    finish(holder, signal.SIGKILL)
    started = time.monotonic()
    with node_lock(tmp_path / "model", "mine", CALLER):
        owner = json.loads(lock_file(lock_dir).read_text())
        assert (owner["pid"], owner["purpose"]) == (os.getpid(), "mine")
    assert time.monotonic() - started < FOREVER / 3
    assert lock_file(lock_dir).read_text() == ""


def test_of_a_process_only_the_first_word_is_shown(
    holder: subprocess.Popen[str], tmp_path: Path, lock_dir: Path
) -> None:
    text = lock_file(lock_dir).read_text()
    assert json.loads(text)["process"] == sys.executable
    assert str(tmp_path) not in text


def test_a_child_does_not_keep_the_lock_of_a_parent_that_crashes(
    tmp_path: Path, lock_dir: Path
) -> None:
    process = hold(tmp_path, "os.fork() or sys.stdin.read()")
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
    process.kill()
    process.wait()
    with lock_file(lock_dir).open() as file:

        def taken() -> bool:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            return False

        until(taken)  # the child has to run a moment
    os.kill(child, signal.SIGKILL)
    process.communicate()


def test_a_child_that_leaves_the_block_does_not_release_its_parents_lock(
    tmp_path: Path, lock_dir: Path
) -> None:
    with hold(tmp_path, "os.waitpid(os.fork() or sys.exit(), 0)") as process:
        with lock_file(lock_dir).open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert json.loads(lock_file(lock_dir).read_text())["pid"] == process.pid
        process.kill()


def test_a_child_that_has_the_descriptor_still_does_not_keep_the_lock(
    tmp_path: Path, lock_dir: Path
) -> None:
    with node_lock(tmp_path / "model", "mine", CALLER):
        (file,) = module._open_files
        copied = os.dup(file.fd)  # as of a child before it runs its program
    with lock_file(lock_dir).open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(copied)


def test_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    inside: list[int] = []
    entered = 0
    together = threading.Event()

    def hold() -> None:
        nonlocal entered
        with node_lock(tmp_path / "model", "mine", CALLER):
            entered += 1
            inside.append(1)
            if len(inside) > 1:
                together.set()
            together.wait(0.02)
            inside.pop()

    threads = [threading.Thread(target=hold) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert entered == 5
    assert not together.is_set()


@pytest.mark.usefixtures("holder")
def test_other_folders_are_not_locked(tmp_path: Path) -> None:
    locked(tmp_path / "other")


def test_two_names_of_one_folder_are_one_lock(tmp_path: Path, lock_dir: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    for name in ("model", "link"):
        locked(tmp_path / name)
    assert lock_file(lock_dir).exists()


def test_a_folder_whose_name_is_no_utf_8_can_be_locked(tmp_path: Path) -> None:
    locked(tmp_path / os.fsdecode(b"\xff"))


@pytest.mark.usefixtures("holder")
@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError, RuntimeError])
def test_waiting_ends_when_it_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    monkeypatch.setattr(module, "_CHECK_S", 0.1)
    calls = []

    def cancelled() -> None:
        calls.append(time.monotonic())
        if len(calls) == 2:
            raise error("cancelled")

    started = time.monotonic()
    with (
        # As it is: a TimeoutError is an OSError, too, but none of the lock file's.
        pytest.raises(error, match=r"^cancelled$"),
        node_lock(tmp_path / "model", "mine", Caller(LOGGER, check_cancelled=cancelled)),
    ):
        pass
    assert 0.2 <= time.monotonic() - started < FOREVER / 3


def test_cancellation_is_looked_for_about_once_per_second() -> None:
    assert (module._CHECK_S, module._DENIED_S) == (1, 1)


def test_a_lock_file_that_is_removed_while_one_waits_is_made_anew(
    holder: subprocess.Popen[str],
    tmp_path: Path,
    lock_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_CHECK_S", 0.0)
    waits, inside, leave = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        with node_lock(tmp_path / "model", "mine", Caller(LOGGER, check_cancelled=waits.set)):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    assert waits.wait(FOREVER)
    lock_file(lock_dir).unlink()
    assert inside.wait(FOREVER)
    with lock_file(lock_dir).open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    leave.set()
    thread.join()


NOW = {"pid": 1, "host": "node-b", "process": "python", "purpose": "model", "since": 0}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 4096,
        b"[]",
        b"null",
        json.dumps(NOW | {"since": "now"}).encode(),
        json.dumps(NOW | {"since": 1e300}).encode(),
        json.dumps(NOW | {"since": float("nan")}).encode(),
        json.dumps(NOW | {"pid": None}).encode(),
        json.dumps(NOW | {"pid": "/../self"}).encode(),
        json.dumps({"pid": 1}).encode(),
        json.dumps(NOW | {"purpose": "x" * 5000}).encode(),
        json.dumps(NOW | {"host": os.uname().nodename, "pid": 2**22 + 1}).encode(),
    ],
)
def test_an_owner_that_makes_no_sense_is_another_process(
    holder: subprocess.Popen[str],
    tmp_path: Path,
    lock_dir: Path,
    caplog: pytest.LogCaptureFixture,
    content: bytes,
) -> None:
    lock_file(lock_dir).write_bytes(content)
    assert waited_for(tmp_path, caplog, holder) == "another process"


def waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, holder: subprocess.Popen[str]
) -> str:
    with after_lines(1, lambda: finish(holder, signal.SIGKILL), caplog) as lines:
        locked(tmp_path / "model")
    found = re.fullmatch(r"\S+: waiting for (.*), \d s", lines[0], re.DOTALL)
    assert found is not None
    return found[1]


def test_what_another_user_says_cannot_look_like_our_log(
    holder: subprocess.Popen[str],
    tmp_path: Path,
    lock_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    owner = NOW | {
        "host": "b\x1b[2J",
        "process": "\u202ep\r",
        "purpose": "x\nERROR " + "y" * 900,
    }
    lock_file(lock_dir).write_text(json.dumps(owner))
    text = waited_for(tmp_path, caplog, holder)
    since = time.strftime("%H:%M:%S", time.localtime(0))
    assert text == f"pid 1 on b[2J (p: xERROR {'y' * 293}, since {since})"


def test_a_purpose_of_any_length_can_be_read_again(tmp_path: Path, lock_dir: Path) -> None:
    with node_lock(tmp_path / "model", "\U0001f600" * 2000 + "\ud800", CALLER):
        data = lock_file(lock_dir).read_bytes()
    assert len(data) < 4096
    assert json.loads(data)["purpose"] == "\U0001f600" * 300


def test_a_full_disk_is_no_reason_not_to_lock(
    tmp_path: Path, lock_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("os.pwrite", full)
    with node_lock(tmp_path / "model", "mine", CALLER):
        assert lock_file(lock_dir).read_text() == ""


def test_locks_are_in_a_private_folder_of_the_local_disk(tmp_path: Path, default_dir: Path) -> None:
    default_dir.mkdir()
    default_dir.chmod(0o777)
    locked(tmp_path / "model")
    assert default_dir.stat().st_mode & 0o7777 == 0o700
    assert lock_file(default_dir).stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "model").exists()


def test_a_private_folder_of_another_user_is_not_trusted(
    tmp_path: Path, default_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    text = (
        f"'{tmp_path}/rayserve_hooks-12345' belongs to user {ME} and not to 12345; remove it, or "
        "set RAYSERVE_HOOKS_LOCK_DIR to a folder of yours"
    )
    with refused(text):
        locked(tmp_path / "model")


def test_a_private_folder_is_no_link(tmp_path: Path, default_dir: Path) -> None:
    (tmp_path / "victim").mkdir()
    default_dir.symlink_to("victim")
    text = (
        f"'{default_dir}' is a symbolic link of user {ME} and no folder; remove it, or "
        "set RAYSERVE_HOOKS_LOCK_DIR to a folder of yours"
    )
    with refused(text):
        locked(tmp_path / "model")
    assert not list((tmp_path / "victim").iterdir())


@needs_root
@pytest.mark.parametrize("kind", ["default", "named"])
def test_a_lock_folder_is_no_link_of_another_user(
    tmp_path: Path, default_dir: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "victim").mkdir()
    default_dir.symlink_to("victim")
    os.chown(default_dir, BOB, BOB, follow_symlinks=False)
    if kind == "named":
        monkeypatch.setenv(LOCK_DIR_VARIABLE, str(default_dir))
    pattern = f"^'{default_dir}' is a symbolic link of user {BOB} and no folder; remove it, or set "
    with pytest.raises(DownloadError, match=pattern):
        locked(tmp_path / "model")
    assert not list((tmp_path / "victim").iterdir())


def test_a_lock_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(tmp_path / "file"))
    with refused(f"'{tmp_path}/file' is a file of user {ME} and no folder; remove it, or {COMMON}"):
        locked(tmp_path / "model")
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(tmp_path / "file" / "locks"))
    pattern = rf"^cannot lock '{tmp_path}/file/locks': NotADirectoryError: .*; {COMMON}$"
    with pytest.raises(DownloadError, match=pattern):
        locked(tmp_path / "model")


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(errno.ENOLCK, monkeypatch)
    pattern = rf"^cannot lock '{tmp_path}/locks/\w{{32}}\.lock': OSError: \[Errno 37\].*; {COMMON}$"
    with pytest.raises(DownloadError, match=pattern):
        locked(tmp_path / "model")


def fail_with(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, operation: int) -> None:
        if operation != fcntl.LOCK_UN:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)


PLANTS: list[tuple[Callable[[Path, Path], Any], str]] = [
    (lambda path, victim: path.symlink_to(victim), "a symbolic link of user {} and no file"),
    (
        lambda path, victim: path.symlink_to(f"{victim}-new"),
        "a symbolic link of user {} and no file",
    ),
    (lambda path, victim: path.hardlink_to(victim), "a file of user {} with 2 names (hard links)"),
    (lambda path, _: os.mkfifo(path), "a named pipe of user {} and no file"),
    (lambda path, _: path.mkdir(), "a folder of user {} and no file"),
]


@pytest.mark.parametrize(("plant", "kind"), PLANTS)
@pytest.mark.parametrize("place", ["default", "named", "cache"])
@pytest.mark.timeout(10)
def test_what_is_planted_under_a_locks_name_is_refused(
    tmp_path: Path,
    plant: Callable[[Path, Path], Any],
    kind: str,
    place: str,
    request: pytest.FixtureRequest,
) -> None:
    folder: Path = request.getfixturevalue("default_dir" if place == "default" else "lock_dir")
    locked(tmp_path / "model")
    path, victim = lock_file(folder), tmp_path / "victim"
    path.unlink()
    victim.write_text("precious")
    plant(path, victim)
    way_out = "set HF_HOME to move the cache" if place == "cache" else COMMON
    with refused(f"'{path}' is {kind.format(ME)}; remove it, or {way_out}"):
        if place == "cache":
            with folder_lock(path, "mine", CALLER):
                pass
        else:
            locked(tmp_path / "model")
    assert victim.read_text() == "precious"
    assert not Path(f"{victim}-new").exists()


@needs_root
def test_a_lock_file_of_another_user_in_the_private_folder_is_refused(
    tmp_path: Path, default_dir: Path
) -> None:
    locked(tmp_path / "model")
    path = lock_file(default_dir)
    os.chown(path, BOB, BOB)
    with refused(f"'{path}' belongs to user {BOB} and not to {ME}; remove it, or {COMMON}"):
        locked(tmp_path / "model")


class Users:
    """Processes of several users that lock one folder."""

    def __init__(self, common: Path, lock: str = "node_lock") -> None:
        self.lock, self.path, self._all = lock, common / "model", list[subprocess.Popen[str]]()

    def start(self, user: int, umask: str = "22") -> subprocess.Popen[str]:
        self._all.append(start_as(user, USER, self.lock, self.path, umask))
        return self._all[-1]

    def end(self) -> None:
        for process in self._all:
            with process:  # closes what is open
                process.kill()


@pytest.fixture
def users(common: Path) -> Iterator[Users]:
    found = Users(common)
    yield found
    found.end()


@needs_root
@pytest.mark.parametrize("umask", ["22", "77", "0"])
def test_two_users_lock_in_a_folder_that_both_may_use(
    common: Path, users: Users, umask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(common))
    alice = users.start(ALICE, umask)
    assert line(alice) == "has it None\n"
    path = lock_file(common)
    status = path.stat()
    assert (status.st_uid, status.st_mode & 0o777) == (ALICE, 0o644)
    bob = users.start(BOB, umask)
    waits = rf"{users.path}: waiting for pid {alice.pid} \({sys.executable}: model of {ALICE}, .*\n"
    assert re.fullmatch(waits, line(bob))
    assert alice.stdin is not None
    alice.stdin.close()
    while (text := line(bob)) != "has it None\n":
        assert re.fullmatch(f"{waits}|.*another process, . s\n", text)
    # Now the other way round, in the file that is still the first one's.
    again = users.start(ALICE, umask)
    assert re.fullmatch(rf"{users.path}: waiting for another process, \d s\n", line(again))
    bob.kill()
    while (text := line(again)) != "has it None\n":
        assert "another process" in text
    assert path.stat().st_uid == ALICE


@needs_root
def test_a_user_who_may_not_use_the_lock_folder_learns_what_to_set(
    common: Path, users: Users, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(common / "locks"))
    assert line(users.start(ALICE)) == "has it None\n"
    text = run_as(BOB, USER, "node_lock", users.path, "22")
    pattern = rf".*DownloadError: cannot lock '{common}/locks': PermissionError: .*; {COMMON}"
    assert re.fullmatch(pattern, text)


@needs_root
def test_a_lock_file_that_stays_unreadable_is_an_error(
    common: Path, users: Users, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(common))
    locked(users.path)
    lock_file(common).chmod(0o600)
    bob = users.start(BOB)
    waits = rf"{users.path}: waiting for another process, \d s\n"
    assert re.fullmatch(waits, line(bob))  # for a moment it may be a new one
    lock_file(common).chmod(0o644)
    while (text := line(bob)) != "has it None\n":
        assert re.fullmatch(waits, text)
    lock_file(common).chmod(0o600)
    impatient = USER.replace("0.02, 20", "0.02, 0.1")
    text = run_as(BOB, impatient, "node_lock", users.path, "22")
    path = rf"{common}/\w{{32}}\.lock"
    assert re.fullmatch(rf".*: cannot lock '{path}': PermissionError: .*; {COMMON}", text)


@needs_root
def test_two_users_lock_in_a_cache_of_theirs(common: Path, users: Users) -> None:
    users.lock, users.path = "folder_lock", common / "lock"
    alice = users.start(ALICE)
    assert line(alice) == "has it True\n"
    bob = users.start(BOB)
    waits = rf"{users.path}: waiting for pid {alice.pid} \({sys.executable}: model of {ALICE}, .*\n"
    assert re.fullmatch(waits, line(bob))
    alice.kill()
    while (text := line(bob)) != "has it True\n":
        assert "waiting for" in text


@needs_root
@pytest.mark.parametrize("made", [False, True])
def test_a_cache_that_cannot_be_written_is_not_locked(common: Path, made: bool) -> None:
    (common / "cache").mkdir()
    if made:
        (common / "cache" / "state").mkdir()
    path = common / "cache" / "state" / "lock"
    script = USER.replace("sys.stdin.read()", "")
    assert run_as(BOB, script, "folder_lock", path, "22") == "has it False\n"


def test_a_lock_in_the_cache_excludes_and_says_whether_it_is_held(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state" / "lock"
    umask = os.umask(0o002)
    with folder_lock(path, "mine", CALLER) as had:
        os.umask(umask)
        assert had is True
        assert path.stat().st_mode & 0o777 == 0o664
        assert path.parent.stat().st_mode & 0o777 == 0o775
        with path.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert json.loads(path.read_text())["purpose"] == "mine"
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with (
            after_lines(1, lambda: fcntl.flock(file, fcntl.LOCK_UN), caplog) as lines,
            folder_lock(path, "mine", CALLER) as had,
        ):
            assert had
    assert re.fullmatch(rf"{path}: waiting for another process, \d s", lines[0])


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOSYS", "EBADF"])
def test_a_cache_without_locks_is_used_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fail_with(getattr(errno, name), monkeypatch)
    with folder_lock(tmp_path / "lock", "mine", CALLER) as had:
        assert had is False


@pytest.mark.parametrize("name", ["EROFS", "EACCES", "EPERM", "ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("refused", ["mkdir", "open"])
def test_a_cache_where_nothing_can_be_made_is_used_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, refused: str
) -> None:
    number, original = getattr(errno, name), os.open
    if refused == "open":
        (tmp_path / "state").mkdir()

    def fails(path: str, *args: Any, **kwargs: Any) -> int:
        if refused == "mkdir" or args[0] & os.O_CREAT:
            raise OSError(number, os.strerror(number))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, refused, fails)
    with folder_lock(tmp_path / "state" / "lock", "mine", CALLER) as had:
        assert had is False


def test_any_other_failure_of_a_lock_in_the_cache_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    end = "; set HF_HOME to move the cache$"
    pattern = rf"^cannot lock '{tmp_path}/file/state/lock': NotADirectoryError: .*{end}"
    with (
        pytest.raises(DownloadError, match=pattern),
        folder_lock(tmp_path / "file" / "state" / "lock", "mine", CALLER),
    ):
        pass
    fail_with(errno.EIO, monkeypatch)
    with (
        pytest.raises(DownloadError, match=rf"^cannot lock '{tmp_path}/lock': OSError: .*{end}"),
        folder_lock(tmp_path / "lock", "mine", CALLER),
    ):
        pass


def test_what_fails_under_a_lock_is_what_it_is(tmp_path: Path) -> None:
    for lock in (node_lock, folder_lock):
        with (
            pytest.raises(OSError, match=r"^mine$"),
            lock(tmp_path / "a", "mine", CALLER),
        ):
            raise OSError("mine")
    with folder_lock(tmp_path / "a", "mine", CALLER) as had:
        assert had


@needs_root
def test_two_users_whom_no_lock_keeps_apart_are_refused(
    tmp_path: Path, default_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(errno.ENOLCK, monkeypatch)
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, BOB, BOB)
    text = (
        f"'{state}' belongs to user {BOB}, its file system has no locks, and those in "
        f"'{default_dir}' are of user {ME} alone; {COMMON}"
    )
    with refused(text), folder_lock(state / "lock", "mine", CALLER):
        pass
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(tmp_path))
    with folder_lock(state / "lock", "mine", CALLER) as had:
        assert not had


@needs_root
def test_a_user_who_can_only_read_is_not_refused(common: Path) -> None:
    (common / "lock").touch()
    common.chmod(0o755)
    script = f"""
del os.environ[{LOCK_DIR_VARIABLE!r}]
import errno, fcntl
def flock(fd, operation):
    raise OSError(errno.EBADF, "as on NFS, for a file that is open for reading")
fcntl.flock = flock
{USER.replace("sys.stdin.read()", "")}
"""
    assert run_as(BOB, script, "folder_lock", common / "lock", "22") == "has it False\n"


ROOT = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard"


def mounted(point: str, kind: str, options: str = "rw", extra: str = "") -> str:
    return f"60 27 0:44 / {point} rw,relatime shared:5 {extra}- {kind} source {options}"


@pytest.mark.parametrize(
    ("mounts", "path", "reaches"),
    [
        ([ROOT], "/cache", True),
        ([ROOT, mounted("/cache", "nfs4")], "/cache/models", True),
        ([ROOT, mounted("/cache", "nfs4", "rw,vers=4.2,local_lock=none")], "/cache", True),
        ([ROOT, mounted("/cache", "nfs", "rw,local_lock=posix")], "/cache", True),
        ([ROOT, mounted("/cache", "nfs", "rw,nolock,local_lock=none")], "/cache/a", False),
        ([ROOT, mounted("/cache", "nfs4", "rw,local_lock=flock")], "/cache", False),
        ([ROOT, mounted("/cache", "nfs", "rw,local_lock=all")], "/cache", False),
        ([ROOT, mounted("/cache", "lustre", "rw,flock")], "/cache", True),
        ([ROOT, mounted("/cache", "lustre", "rw,localflock")], "/cache", False),
        ([ROOT, mounted("/cache", "gfs2", "rw,localflocks")], "/cache", False),
        *(
            ([ROOT, mounted("/cache", kind)], "/cache", False)
            for kind in ("fuse", "fuse.gcsfuse", "9p", "virtiofs", "cifs", "smb3", "beegfs")
        ),
        # Beside it, not below it.
        ([ROOT, mounted("/cache", "9p")], "/cache-2", True),
        # The longest mount point counts, whichever comes first, and of equal ones the last.
        ([ROOT, mounted("/a/b", "9p"), mounted("/a", "xfs")], "/a/b/c", False),
        ([ROOT, mounted("/a", "9p"), mounted("/a/b", "xfs")], "/a/b/c", True),
        ([ROOT, mounted("/a", "9p"), mounted("/a", "xfs")], "/a/c", True),
        ([ROOT, mounted("/a", "xfs"), mounted("/a", "9p")], "/a/c", False),
        # Blanks and backslashes are octal, optional fields vary, other names are as they are.
        ([ROOT, mounted(r"/my\040big\134\011\012cache", "9p")], "/my big\\\t\ncache/a", False),
        ([ROOT, mounted("/a", "9p", extra="master:2 propagate_from:3 ")], "/a", False),
        ([ROOT, "60 27 0:44 / /a rw - 9p  rw"], "/a", False),
        ([ROOT, mounted("/caché", "9p")], "/caché", False),
        # Without options of the file system, or without any mount.
        (["27 1 254:0 / / rw,nolock - nfs a:/b rw"], "/cache", False),
        (["", "nonsense", "27 - ext4"], "/cache", False),
    ],
)
def test_a_lock_reaches_other_nodes_as_its_mount_says(
    mounts: list[str], path: str, reaches: bool
) -> None:
    assert lock_reaches_other_nodes("\n".join([*mounts, ""]), path) is reaches


def test_the_mounts_are_those_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = f"{ROOT}\n{mounted(str(tmp_path.resolve()), '9p')}\n".encode()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: mounts if "mountinfo" in str(path) else b"")
        (tmp_path / "inside").mkdir()
        assert not shared_lock_reaches_other_nodes(tmp_path / "inside" / "none")
        (tmp_path / "outside").symlink_to("/")
        assert shared_lock_reaches_other_nodes(tmp_path / "outside" / "none")

    def unreadable(path: Path) -> bytes:
        raise FileNotFoundError(path)

    assert shared_lock_reaches_other_nodes(Path("/proc"))
    monkeypatch.setattr(Path, "read_bytes", unreadable)
    assert not shared_lock_reaches_other_nodes(Path("/proc"))
