"""A node's folder of a start: whose it is, and what survives a process that is killed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from plugins_for_tests import run_script

from rayserve_hooks.cluster import engine_folder
from rayserve_hooks.cluster.engine_folder import (
    EngineFolder,
    Report,
    mark_of,
    on_node,
    remove_left_behind,
)
from rayserve_hooks.context import NodeInfo, ProcessInfo
from rayserve_hooks.errors import DownloadError, HookError, Phase
from rayserve_hooks.trace import TraceEntry

NODE = NodeInfo("n1", "10.0.0.1", is_local=True)
MARK = "0123abcd-n1"


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(engine_folder, "_PARENT", tmp_path)
    return tmp_path


@pytest.fixture
def folder() -> Iterator[EngineFolder]:
    made = EngineFolder.make(MARK, "what they need")
    yield made
    made.remove()


def report(rank: int = 0, **fields: object) -> Report:
    return Report(NODE, ProcessInfo("worker", rank), **fields)  # type: ignore[arg-type]


def call(start: float) -> TraceEntry:
    return TraceEntry("Register", "on_before_engine_init", "worker", "n1", start=start)


def test_it_is_this_users_alone_and_named_after_the_start(folder: EngineFolder) -> None:
    assert MARK in folder.path.name
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    found = EngineFolder.find(MARK)
    assert found.request() == "what they need"
    found.close()


def test_one_who_has_found_it_does_not_remove_it(folder: EngineFolder) -> None:
    # As in a child that is forked from its maker, and exits in order.
    EngineFolder.find(MARK).remove()
    assert folder.path.exists()


def test_a_second_one_of_the_same_start_is_refused(folder: EngineFolder) -> None:
    with pytest.raises(OSError, match=MARK):
        EngineFolder.make(MARK, "other")
    found = EngineFolder.find(MARK)
    assert found.request() == "what they need"
    found.close()


def test_removing_leaves_nothing_and_may_be_done_again(parent: Path) -> None:
    folder = EngineFolder.make(MARK, "x")
    folder.remove()
    folder.remove()
    assert list(parent.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        EngineFolder.find(MARK)


def test_one_that_cannot_be_filled_leaves_nothing(parent: Path) -> None:
    with pytest.raises(TypeError, match="generator"):
        EngineFolder.make(MARK, (number for number in range(1)))
    assert list(parent.iterdir()) == []


def test_a_link_in_its_place_is_not_followed(parent: Path, tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    planted.mkdir(mode=0o700)
    (parent / f"rayserve_hooks-engine-{os.geteuid()}-{MARK}").symlink_to(planted)
    with pytest.raises(NotADirectoryError):
        EngineFolder.find(MARK)


def test_one_that_others_may_enter_is_refused(folder: EngineFolder) -> None:
    folder.path.chmod(0o770)
    with pytest.raises(PermissionError, match="not this user's alone"):
        EngineFolder.find(MARK)


def test_another_users_is_refused(folder: EngineFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_folder, "_path", lambda _: folder.path)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError, match="not this user's alone"):
        EngineFolder.find(MARK)


def test_a_link_in_it_is_not_read(folder: EngineFolder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"")
    (folder.path / "request").unlink()
    (folder.path / "request").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DownloadError, match="is a symbolic link of user"):
        folder.request()


@pytest.mark.parametrize("mark", ["../x", "", "ab-../x", "ab", "/etc-n1"])
def test_what_is_no_mark_is_refused(mark: str) -> None:
    with pytest.raises(ValueError, match="is no mark of a start"):
        EngineFolder.find(mark)


def test_the_last_report_of_a_process_counts(folder: EngineFolder) -> None:
    file = folder.report()
    file.write(report())
    file.write(report(trace=[call(1)]))
    assert folder.reports() == [report(trace=[call(1)])]
    error = HookError(node="n1", phase=Phase.BEFORE_ENGINE_INIT, detail="no such parser")
    file.write(report(trace=[call(1)], error=error, ended=True))
    file.close()
    (last,) = folder.reports()
    assert str(last.error) == str(error)
    assert last.ended
    assert not last.killed


def test_a_report_that_is_being_written_is_not_read(folder: EngineFolder) -> None:
    file = folder.report()
    file.write(report())
    file.write(report(ended=True))
    path = folder.path / f"process-{os.getpid()}"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert not any(found.ended for found in folder.reports())
    file.close()


def test_a_process_reports_once(folder: EngineFolder) -> None:
    folder.report().close()
    with pytest.raises(FileExistsError):
        folder.report()


def test_reports_come_in_the_order_in_which_they_began(
    folder: EngineFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, start in enumerate((3.0, 1.0, 2.0)):
        monkeypatch.setattr(os, "getpid", lambda rank=rank: 100 + rank)
        file = folder.report()
        file.write(report(rank, trace=[call(start)], ended=True))
        file.close()
    monkeypatch.undo()
    assert [found.process.rank for found in folder.reports()] == [1, 2, 0]


REPORTS_AND_WAITS = """
    import sys, time
    from pathlib import Path
    from rayserve_hooks.cluster import engine_folder
    from rayserve_hooks.context import NodeInfo, ProcessInfo
    engine_folder._PARENT = Path(sys.argv[1])
    {what}
    print("ready", flush=True)
    sys.stdin.read()
"""

REPORTS_ONCE = (
    f"file = engine_folder.EngineFolder.find({MARK!r}).report(); "
    "node = NodeInfo('n1', '10.0.0.1', True); "
    "file.write(engine_folder.Report(node, ProcessInfo('worker', 1)))"
)


def process(parent: Path, what: str) -> subprocess.Popen[str]:
    import textwrap

    script = textwrap.dedent(REPORTS_AND_WAITS).format(what=what)
    started = subprocess.Popen(
        [sys.executable, "-c", script, str(parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def killed(started: subprocess.Popen[str]) -> None:
    with started:
        started.send_signal(signal.SIGKILL)


def test_a_process_that_is_killed_is_known_from_one_that_runs(
    folder: EngineFolder, parent: Path
) -> None:
    started = process(parent, REPORTS_ONCE)
    (alive,) = folder.reports()
    killed(started)
    (gone,) = folder.reports()
    assert (alive.killed, gone.killed) == (False, True)
    assert gone.process.pid == started.pid


def test_two_who_look_at_once_see_the_same(
    folder: EngineFolder, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The watch looks in a thread of its own, whoever words the failure in another.
    killed(process(parent, REPORTS_ONCE))
    at_once: list[Report] = []
    complete = engine_folder._complete

    def while_another_looks(data: bytes) -> Iterator[bytes]:
        monkeypatch.setattr(engine_folder, "_complete", complete)
        at_once.extend(folder.reports())
        return complete(data)

    monkeypatch.setattr(engine_folder, "_complete", while_another_looks)
    at_once.extend(folder.reports())
    assert [found.killed for found in at_once] == [True, True]


def test_none_of_several_who_look_at_once_misses_a_report(folder: EngineFolder) -> None:
    # Descriptors that are copies share their position, also in a folder's listing.
    file = folder.report()
    file.write(report())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: len(folder.reports()), range(4000)))
    file.close()
    assert set(found) == {1}


def test_the_next_start_removes_what_one_that_was_killed_has_left(parent: Path) -> None:
    started = process(parent, "engine_folder.EngineFolder.make('feed-n1', 'x')")
    (left,) = parent.iterdir()
    remove_left_behind()
    assert left.exists(), "its maker lives"
    killed(started)
    folder = EngineFolder.make(MARK, "x")
    assert list(parent.iterdir()) == [folder.path]
    folder.remove()


def test_what_is_not_ours_is_not_removed(parent: Path) -> None:
    others = [
        parent / f"rayserve_hooks-engine-{os.geteuid() + 1}-feed-n1",
        parent / "rayserve_hooks-0",
        parent / "other",
    ]
    for other in others:
        other.mkdir()
    (parent / f"rayserve_hooks-engine-{os.geteuid()}-beef-n1").symlink_to(parent / "other")
    remove_left_behind()
    assert all(other.exists() for other in others)


def test_a_process_that_ends_in_order_removes_its_own(parent: Path) -> None:
    run_script(
        """
        import os, sys
        from pathlib import Path
        from rayserve_hooks.cluster import engine_folder
        engine_folder._PARENT = Path(sys.argv[1])
        folder = engine_folder.EngineFolder.make("feed-n1", "x")
        if os.fork() == 0:
            sys.exit()  # a child's end is not the start's
        os.wait()
        assert folder.path.exists()
        """,
        str(parent),
    )
    assert list(parent.iterdir()) == []


def test_a_mark_on_another_node_is_of_the_same_start() -> None:
    assert on_node(MARK, "n2") == "0123abcd-n2" == mark_of("0123abcd", "n2")
    assert on_node(MARK, None) == MARK
