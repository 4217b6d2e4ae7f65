"""Snapshots of a model: complete or not there, whoever looks, writes, or is killed."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.download import cache
from rayserve_hooks.download.model import Mirror, download_node
from rayserve_hooks.download.state import Log
from rayserve_hooks.errors import DownloadError

ALL = NodeModelDownloadable.MODEL_AND_TOKENIZER
TOKENIZER = NodeModelDownloadable.TOKENIZER_ONLY
VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
RANGE = 64 * 2**10
CHUNK = 16 * 2**10

Files = dict[str, str]
FIRST: Files = {
    "config.json": "{}",
    "tokenizer.json": "tokens",
    "model-1.safetensors": "one",
    "model-2.safetensors": "two",
    "model-3.safetensors": "three",
    "model.safetensors.index.json": "index",
    "sub/a": "a file, later a folder",
    "gone/b.json": "b",
}
SECOND: Files = {
    "config.json": "{}",
    "tokenizer.json": "other tokens",
    "model.safetensors": "all in one",
    "sub/a/c.json": "c",
}
THIRD: Files = {"config.json": "{}", "model.safetensors": "all in one", "sub/a/c.json": "d"}

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["boto3", "huggingface_hub.constants", "obstore.store", "rayserve_hooks.download.model"]
)


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("RAYSERVE_HOOKS_LOCK_DIR", str(tmp_path / "locks"))
    return tmp_path / "hub"


@pytest.fixture
def model(hub: Path) -> Path:
    return hub / "models--org--tiny"


@pytest.fixture
def state(model: Path) -> Path:
    return model / ".rayserve_hooks"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return put(tmp_path / "store", FIRST)


@pytest.fixture(autouse=True)
def _uses_end() -> Iterator[None]:
    yield
    end_uses()


def end_uses() -> None:
    """Let this process use no snapshot any more, as if it had ended."""
    while cache._used:
        os.close(cache._used.popitem()[1])


def put(folder: Path, files: Files, revision: str | None = None) -> Path:
    """Make a folder hold just these files; those that are the same are not touched."""
    wanted = dict(files) | ({"hash": revision} if revision else {})
    for path in sorted(folder.rglob("*"), reverse=True):
        name = str(path.relative_to(folder))
        if path.is_dir():
            with contextlib.suppress(OSError):
                path.rmdir()
        elif wanted.get(name) != path.read_text():
            path.unlink()
    for name, text in wanted.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return folder


def get(store: Path | str, mode: NodeModelDownloadable = ALL) -> Path:
    uri = store if isinstance(store, str) else store.as_uri()
    path = download_node("org/tiny", Mirror(uri), mode)
    assert path is not None
    return Path(path)


def held(folder: Path) -> Files:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def main(model: Path) -> str:
    return (model / "refs" / "main").read_text()


def fetched(caplog: pytest.LogCaptureFixture) -> list[int]:
    """Return how many files each download of the test had to fetch."""
    return [int(count) for count in re.findall(r"files, (\d+) to fetch", caplog.text)]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "rayserve_hooks.download")
    return caplog


class TestReplacedInPlace:
    @pytest.mark.parametrize("revision", [None, "same"])
    def test_what_the_store_no_longer_lists_is_not_in_the_folder(
        self, revision: str | None, store: Path, model: Path, log: pytest.LogCaptureFixture
    ) -> None:
        put(store, FIRST, revision)
        first = get(store)
        put(store, SECOND, revision)
        second = get(store)
        assert held(second) == SECOND
        assert main(model) == second.name
        assert (first == second) == (revision is not None)
        if first != second:
            assert held(first) == FIRST
            # What has not changed is no second copy.
            assert (first / "config.json").samefile(second / "config.json")
        assert fetched(log) == [8, 3]
        put(store, FIRST, revision)
        assert held(get(store)) == FIRST

    def test_going_back_fetches_nothing(
        self, store: Path, tmp_path: Path, model: Path, log: pytest.LogCaptureFixture
    ) -> None:
        first = get(store)
        store.rename(tmp_path / "kept")
        put(store, SECOND)
        get(store)
        shutil.rmtree(store)
        (tmp_path / "kept").rename(store)
        again = get(store)
        assert held(again) == FIRST
        assert main(model) == again.name
        assert again == first
        assert fetched(log) == [8, 4, 0]

    @pytest.mark.parametrize("revision", [None, "same"])
    def test_files_of_others_stay(self, revision: str | None, store: Path, tmp_path: Path) -> None:
        put(store, FIRST, revision)
        first = get(store)
        put(first / "mine", {"deep/notes.txt": "my notes"})
        (first / "dangling").symlink_to("nowhere")
        (first / "folder").symlink_to(tmp_path)
        os.mkfifo(first / "pipe")
        put(store, SECOND, revision)
        second = get(store)
        for folder in (first, second):
            assert (folder / "mine" / "deep" / "notes.txt").read_text() == "my notes"
            assert (folder / "dangling").readlink() == Path("nowhere")
            assert (folder / "folder").readlink() == tmp_path
            assert (folder / "pipe").is_fifo()
        assert not list(second.glob("model-*"))

    @pytest.mark.parametrize(
        ("foreign", "shown"), [("model.safetensors/x", "folder"), ("sub/z", "")]
    )
    def test_one_that_is_in_the_way_is_named(self, foreign: str, shown: str, store: Path) -> None:
        first = get(store)
        (first / foreign).parent.mkdir(exist_ok=True)
        (first / foreign).write_text("mine")
        put(store, SECOND)
        if not shown:
            assert held(get(store)) == {**SECOND, foreign: "mine"}
            return
        text = rf"^cannot write '.*model\.safetensors': a {shown} of that name is in the way; move"
        for _ in range(2):
            with pytest.raises(DownloadError, match=text):
                get(store)
        assert held(first) == {**FIRST, foreign: "mine"}

    def test_a_file_in_the_way_of_a_folder_is_named(self, store: Path) -> None:
        first = get(store)
        (first / "new").write_text("mine")
        put(store, {**FIRST, "new/x.json": "x"})
        with pytest.raises(DownloadError, match=r"'.*/new': a file of that name is in the way"):
            get(store)

    def test_who_reads_the_old_one_goes_on_with_it(self, store: Path, model: Path) -> None:
        first = get(store)
        with (first / "model-2.safetensors").open() as opened:
            for files in (SECOND, THIRD, SECOND):
                put(store, files)
                get(store)
                assert opened.read() == "two"
                opened.seek(0)
        put(store, FIRST, "same")
        same = get(store)
        with (same / "model-2.safetensors").open() as opened:
            put(store, SECOND, "same")
            get(store)
            assert opened.read() == "two"


class TestModes:
    def test_a_wider_one_links_what_is_there(
        self, store: Path, log: pytest.LogCaptureFixture
    ) -> None:
        narrow = get(store, TOKENIZER)
        assert set(held(narrow)) == {"config.json", "tokenizer.json"}
        inode = (narrow / "tokenizer.json").stat().st_ino
        wide = get(store)
        assert wide == narrow
        assert held(wide) == FIRST
        assert (wide / "tokenizer.json").stat().st_ino == inode
        assert fetched(log) == [2, 6]

    def test_a_narrower_one_keeps_what_is_there(self, store: Path) -> None:
        get(store)
        assert held(get(store, TOKENIZER)) == FIRST

    def test_a_repair_by_a_narrower_one_keeps_what_is_there(
        self, store: Path, log: pytest.LogCaptureFixture
    ) -> None:
        folder = get(store)
        (folder / "tokenizer.json").write_text("damage")
        assert held(get(store, TOKENIZER)) == FIRST
        assert held(get(store)) == FIRST
        assert fetched(log) == [8, 1, 0]

    def test_a_narrower_one_of_a_changed_store_has_nothing_old(self, store: Path) -> None:
        put(store, FIRST, "same")
        get(store)
        put(store, SECOND, "same")
        assert held(get(store, TOKENIZER)) == {
            name: SECOND[name] for name in ("config.json", "tokenizer.json")
        }


def zeroed(path: Path) -> None:
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(1, 1))


def holed(path: Path) -> None:
    status = path.stat()
    os.truncate(path, 0)
    os.truncate(path, status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("damage", [zeroed, holed, Path.unlink, lambda path: os.truncate(path, 2)])
def test_a_damaged_file_is_repaired(
    damage: Callable[[Path], None], store: Path, log: pytest.LogCaptureFixture
) -> None:
    folder = get(store)
    damage(folder / "model-3.safetensors")
    assert get(store) == folder
    assert held(folder) == FIRST
    assert fetched(log) == [8, 1]


def test_a_file_with_holes_of_its_own_is_read_and_kept(
    store: Path, log: pytest.LogCaptureFixture
) -> None:
    (store / "zeros.bin").write_bytes(bytes(10**6))
    folder = get(store)
    holed(folder / "zeros.bin")
    get(store)
    assert fetched(log) == [9, 0]


def test_without_hard_links_files_are_copied(
    store: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    first = get(store)
    (first / "mine.txt").write_text("mine")
    monkeypatch.setattr(os, "link", refuse)
    put(store, SECOND)
    second = get(store)
    assert held(second) == {**SECOND, "mine.txt": "mine"}
    assert not (first / "config.json").samefile(second / "config.json")
    assert fetched(log) == [8, 3]


class TestSeveralStores:
    def test_each_has_a_snapshot_of_its_own(
        self, store: Path, tmp_path: Path, model: Path, log: pytest.LogCaptureFixture
    ) -> None:
        other = put(tmp_path / "other", SECOND)
        one, two = get(store), get(other)
        assert (held(one), held(two)) == (FIRST, SECOND)
        assert get(store) == one
        assert main(model) == one.name
        assert (held(one), held(two)) == (FIRST, SECOND)
        assert fetched(log) == [8, 4, 0]

    def test_they_may_have_the_same_revision(self, store: Path, tmp_path: Path) -> None:
        put(store, FIRST, "same")
        other = put(tmp_path / "other", SECOND, "same")
        for _ in range(2):
            assert held(get(store)) == FIRST
            assert held(get(other)) == SECOND


HOLD = """
    import sys, time
    from pathlib import Path
    from rayserve_hooks.context import NodeModelDownloadable
    from rayserve_hooks.download.model import Mirror, download_node
    print(download_node("org/tiny", Mirror(sys.argv[1]), NodeModelDownloadable.{mode}), flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another_user_of(store: Path, mode: NodeModelDownloadable = ALL) -> Iterator[Path]:
    """Let another process have the snapshot of what is in the store."""
    command = [sys.executable, "-c", textwrap.dedent(HOLD.format(mode=mode.name)), store.as_uri()]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    try:
        assert process.stdout is not None
        yield Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate()


class TestOldSnapshots:
    def test_the_one_before_stays_and_older_ones_go(self, store: Path, model: Path) -> None:
        first = get(store)
        put(store, SECOND)
        second = get(store)
        assert {path.name for path in model.glob("snapshots/*")} == {first.name, second.name}
        put(store, THIRD)
        third = get(store)
        assert {path.name for path in model.glob("snapshots/*")} == {second.name, third.name}
        known = {path.name for path in model.glob(".rayserve_hooks/revisions/*")}
        assert known == {
            f"{path.name}.{kind}" for path in (second, third) for kind in ("json", "used")
        }

    @pytest.mark.parametrize("widened", [False, True])
    def test_one_that_a_process_has_stays_until_it_ends(
        self, widened: bool, store: Path, model: Path
    ) -> None:
        with another_user_of(store, TOKENIZER if widened else ALL) as first:
            if widened:  # replaced under the process
                get(store)
            for files in (SECOND, THIRD, SECOND):
                put(store, files)
                get(store)
            assert held(first) == FIRST
        put(store, THIRD)
        get(store)
        assert not first.exists()

    def test_files_of_others_stay_in_it(self, store: Path, model: Path) -> None:
        first = get(store)
        put(store, SECOND)
        get(store)
        (first / "late").mkdir()
        (first / "late" / "mine.txt").write_text("mine")
        (first / "link").symlink_to("config.json")
        put(store, THIRD)
        get(store)
        assert (first / "late" / "mine.txt").read_text() == "mine"
        assert (first / "link").is_symlink()
        assert sum(path.is_file() for path in first.rglob("*")) == 1
        put(store, FIRST)
        assert (get(store) / "config.json").exists()

    def test_one_whose_records_are_lost_stays(self, store: Path, state: Path) -> None:
        first = get(store)
        (state / "revisions" / f"{first.name}.json").write_text("[")
        for files in (SECOND, THIRD):
            put(store, files)
            get(store)
        assert held(first) == FIRST

    def test_where_other_nodes_cannot_be_seen_all_stay(
        self, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cache, "shared_lock_reaches_other_nodes", lambda _: False)
        first = get(store)
        for files in (SECOND, THIRD):
            put(store, files)
            get(store)
        assert held(first) == FIRST

    def test_no_descriptor_is_left(self, store: Path) -> None:
        get(store)
        before = len(list(Path("/proc/self/fd").iterdir()))
        for files in (SECOND, THIRD, FIRST, SECOND):
            put(store, files)
            get(store)
            get(store, TOKENIZER)
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_killed_runs_have_left_goes_with_the_next_update(store: Path, state: Path) -> None:
    first = get(store)
    for name in ("stage", "partial", "removed-1", f"replaced-{first.name}", "stage-old", "nothing"):
        (state / name / "sub").mkdir(parents=True)
        (state / name / "sub" / "file").touch()
    for name in ("stage.jsonl", "stage-old.jsonl", "written-1", "written-new", "removed-2"):
        (state / name).write_text("{}")
    for name in ("stage-old", "stage-old.jsonl", "written-1"):
        os.utime(state / name, (1, 1))
    assert get(store) == first
    put(store, SECOND)
    get(store)
    left = {path.name for path in state.iterdir()} - {"lock", "revisions"}
    # Not ours, and perhaps another node's.
    assert left == {"nothing", "partial", "written-new"}


# Kills at each step.


STEPS = ("link", "rename", "replace", "unlink", "mkdir", "rmdir", "write", "pwrite", "symlink")


def die_at(step: int, exchange: bool) -> None:
    """End this process before a step that changes the disk, without a last word."""
    left = [step]

    def counted(do: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(do)
        def run(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return do(*arguments, **options)

        return run

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    setattr(Log, "add", counted(Log.add))  # noqa: B010 - a type checker refuses it
    exchanged = cache._exchange if exchange else lambda *_: False
    cache._exchange = counted(exchanged)


def dying(
    step: int, exchange: bool, uri: str, mode: NodeModelDownloadable, variables: Files
) -> None:
    os.environ.update(variables)
    from obstore.store import from_url

    from_url(uri)
    die_at(step, exchange)
    get(uri, mode)
    os._exit(0)


def variables_of(*starts: str) -> Files:
    starts = (*starts, "RAYSERVE_", "HF_")
    return {name: value for name, value in os.environ.items() if name.startswith(starts)}


def kill_at_each_step(
    store: Path,
    model: Path,
    check: Callable[[int], None],
    *,
    exchange: bool = True,
    mode: NodeModelDownloadable = ALL,
) -> int:
    """Kill a download at its steps, check what is there, and end it; return how many there are."""
    end_uses()
    prepared = model.with_name("prepared")
    model.rename(prepared)
    variables = variables_of()
    for step in range(0, 1000, 2 if exchange else 5):
        shutil.rmtree(model, ignore_errors=True)
        subprocess.run(["cp", "-a", str(prepared), str(model)], check=True)
        arguments = (step, exchange, store.as_uri(), mode, variables)
        process = PROCESSES.Process(target=dying, args=arguments)
        process.start()
        process.join()
        assert process.exitcode in (0, 9)
        check(step)
        get(store, mode)
        end_uses()
        check(-1)
        if process.exitcode == 0:
            return step
    raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False])
class TestKilled:
    def test_in_an_update(self, exchange: bool, store: Path, model: Path) -> None:
        first = get(store)
        (first / "mine.txt").write_text("mine")
        put(store, SECOND)
        mine = {"mine.txt": "mine"}

        def check(step: int) -> None:
            snapshots = [held(path) for path in model.glob("snapshots/*")]
            assert snapshots in ([FIRST | mine], [SECOND | mine, FIRST | mine]) or snapshots == [
                FIRST | mine,
                SECOND | mine,
            ]
            named = held(model / "snapshots" / main(model))
            assert named == SECOND | mine or (step >= 0 and named == FIRST | mine)

        assert kill_at_each_step(store, model, check, exchange=exchange) > 20

    def test_in_an_update_under_the_same_name(
        self, exchange: bool, store: Path, model: Path
    ) -> None:
        put(store, FIRST, "same")
        first = get(store)
        (first / "mine.txt").write_text("mine")
        put(store, SECOND, "same")
        mine = {"mine.txt": "mine"}

        def check(step: int) -> None:
            # For a moment nothing is there where folders cannot be exchanged.
            wanted = [SECOND | mine] + [FIRST | mine] * (step >= 0)
            if exchange or step < 0 or (model / "snapshots" / "same").exists():
                assert held(model / "snapshots" / "same") in wanted
            assert main(model) == "same"

        kill_at_each_step(store, model, check, exchange=exchange)

    def test_in_a_widening(self, exchange: bool, store: Path, model: Path) -> None:
        narrow = held(get(store, TOKENIZER))

        def check(step: int) -> None:
            found = [held(path) for path in model.glob("snapshots/*")]
            assert found == [FIRST] or (step >= 0 and found == [narrow]) or not (exchange or found)

        kill_at_each_step(store, model, check, exchange=exchange)

    def test_then_asked_for_less_and_updated(
        self, exchange: bool, store: Path, model: Path, tmp_path: Path
    ) -> None:
        """What the killed run has published is never taken for somebody else's."""
        narrow = held(get(store, TOKENIZER))
        end_uses()
        prepared = model.with_name("prepared")
        model.rename(prepared)
        variables = variables_of()
        step = 0
        while True:
            shutil.rmtree(model, ignore_errors=True)
            subprocess.run(["cp", "-a", str(prepared), str(model)], check=True)
            put(store, FIRST)
            process = PROCESSES.Process(
                target=dying, args=(step, exchange, store.as_uri(), ALL, variables)
            )
            process.start()
            process.join()
            assert held(get(store, TOKENIZER)) in (narrow, FIRST)
            # The store as it is now, at the same address: no file of before may be left.
            shutil.move(store, tmp_path / "before")
            put(store, SECOND)
            assert held(get(store)) == SECOND
            shutil.rmtree(store)
            shutil.move(tmp_path / "before", store)
            end_uses()
            if process.exitcode == 0:
                break
            step += 3

    def test_in_the_removal_of_an_old_one(self, exchange: bool, store: Path, model: Path) -> None:
        first = get(store)
        put(store, SECOND)
        second = get(store)
        (first / "late.txt").write_text("mine")
        put(store, THIRD)

        def check(step: int) -> None:
            mine = {"late.txt": "mine"}
            found = {path.name: held(path) for path in model.glob("snapshots/*")}
            if not exchange and first.name not in found:  # the next update brings it back
                found[first.name] = held(model / ".rayserve_hooks" / f"replaced-{first.name}")
            assert found.pop(first.name) in (FIRST | mine, mine)
            assert found.pop(second.name) == SECOND
            assert list(found.values()) in ([THIRD], [])
            assert held(model / "snapshots" / main(model)) in (SECOND, THIRD)

        kill_at_each_step(store, model, check, exchange=exchange)
