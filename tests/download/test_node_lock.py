from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rayserve_hooks.download import node_lock as module
from rayserve_hooks.download.node_lock import LOCK_DIR_VARIABLE, node_lock
from rayserve_hooks.errors import DownloadError

LOGGER = logging.getLogger("test")
HOLDER = """
import logging, pathlib, sys, time
from rayserve_hooks.download.node_lock import node_lock
with node_lock(pathlib.Path(sys.argv[1]), "weights of app/model", logging.getLogger()):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def lock_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(tmp_path / "locks"))
    monkeypatch.setattr(module, "_REPORT_S", 0.1)
    return tmp_path / "locks"


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "model")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def finish(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)
    process.communicate()


def test_a_waiting_process_says_for_whom(
    holder: subprocess.Popen[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    threading.Timer(0.35, finish, (holder, signal.SIGTERM)).start()
    with caplog.at_level(logging.DEBUG, LOGGER.name), node_lock(tmp_path / "model", "mine", LOGGER):
        pass
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) >= 2
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
    with node_lock(tmp_path / "model", "mine", LOGGER):
        owner = json.loads(next(lock_dir.glob("*.json")).read_text())
        assert (owner["pid"], owner["purpose"]) == (os.getpid(), "mine")
    assert time.monotonic() - started < 1


def test_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    inside: list[int] = []
    most = []

    def hold() -> None:
        with node_lock(tmp_path / "model", "mine", LOGGER):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=hold) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5


def test_other_folders_are_not_locked(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with node_lock(tmp_path / "other", "mine", LOGGER):
        pass
    finish(holder, signal.SIGKILL)


def test_two_names_of_one_folder_are_one_lock(tmp_path: Path, lock_dir: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    for name in ("model", "link"):
        with node_lock(tmp_path / name, "mine", LOGGER):
            pass
    assert len(list(lock_dir.glob("*.lock"))) == 1


def test_an_owner_file_that_cannot_be_read_is_no_error(
    holder: subprocess.Popen[str],
    tmp_path: Path,
    lock_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    next(lock_dir.glob("*.json")).write_text("{")
    threading.Timer(0.2, finish, (holder, signal.SIGTERM)).start()
    with caplog.at_level(logging.DEBUG, LOGGER.name), node_lock(tmp_path / "model", "mine", LOGGER):
        pass
    assert "waiting for another process, " in caplog.text


def test_locks_are_in_a_private_folder_of_the_local_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LOCK_DIR_VARIABLE)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    with node_lock(tmp_path / "model", "mine", LOGGER):
        pass
    folder = tmp_path / f"rayserve_hooks-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "model").exists()


def test_a_folder_of_another_user_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LOCK_DIR_VARIABLE)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("os.getuid", lambda: 12345)
    text = (
        f"'{tmp_path}/rayserve_hooks-12345' belongs to another user; set RAYSERVE_HOOKS_LOCK_DIR "
        "to a folder of yours"
    )
    with (
        pytest.raises(DownloadError, match=f"^{re.escape(text)}$"),
        node_lock(tmp_path / "model", "mine", LOGGER),
    ):
        pass


def test_a_lock_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(LOCK_DIR_VARIABLE, str(tmp_path / "file"))
    pattern = (
        r"^cannot lock '.*/file': FileExistsError: .*; set RAYSERVE_HOOKS_LOCK_DIR to a folder on "
        r"a local disk that can be written$"
    )
    with (
        pytest.raises(DownloadError, match=pattern),
        node_lock(tmp_path / "model", "mine", LOGGER),
    ):
        pass
