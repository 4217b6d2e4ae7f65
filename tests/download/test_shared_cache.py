"""One cache for several nodes, users and mounts; and what a kill or a power cut leaves of it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3
from test_cache import FIRST, SECOND, TOKENIZER, end_uses, get, held, put
from waiting import until

from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.download import partials, stores, transfer
from rayserve_hooks.download.checksums import Heads
from rayserve_hooks.download.model import Mirror, download_node, model_folder
from rayserve_hooks.errors import DownloadError

ALL = NodeModelDownloadable.MODEL_AND_TOKENIZER
URI = "s3://bucket/model"
VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
RANGE = 256 * 2**10
CHUNK = 16 * 2**10
SHARD = 4 * RANGE + 1000

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount and change users")

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["boto3", "huggingface_hub.constants", "obstore.store", "rayserve_hooks.download.model"]
)


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("RAYSERVE_HOOKS_LOCK_DIR", str(tmp_path / "locks"))
    yield tmp_path / "hub"
    end_uses()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Server]:
    folder = tmp_path / "buckets" / "bucket" / "model"
    folder.mkdir(parents=True)
    numbers = random.Random(0)
    (folder / "config.json").write_text("{}")
    for number in range(4):
        (folder / f"{number}.safetensors").write_bytes(numbers.randbytes(SHARD))
    small_units()
    with s3.serving(tmp_path / "buckets") as running:
        running.etags = "opaque"
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_ENDPOINT_URL": running.url,
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        before = partials.RANGE_BYTES, transfer.SMALL_BYTES
        small_units()
        yield running
        partials.RANGE_BYTES, transfer.SMALL_BYTES = before


def small_units() -> None:
    partials.RANGE_BYTES = RANGE
    transfer.SMALL_BYTES = CHUNK


def assert_equal(server: s3.Server, snapshot: Path) -> None:
    source = server.root / "bucket" / "model"
    assert {path.name for path in snapshot.iterdir()} == {path.name for path in source.iterdir()}
    for file in source.iterdir():
        assert (snapshot / file.name).read_bytes() == file.read_bytes(), file.name


def assert_never_half(server: s3.Server, model: Path) -> None:
    for snapshot in model.glob("snapshots/*"):
        assert_equal(server, snapshot)
    main = model / "refs" / "main"
    assert not main.exists() or (model / "snapshots" / main.read_text()).is_dir()


def without_locks(hub: str) -> None:
    """Let locks in the cache be such as NFS has them without its lock service."""
    flock = fcntl.flock

    def refuse(fd: int, operation: int) -> None:
        if str(Path(f"/proc/self/fd/{fd}").readlink()).startswith(hub):
            raise OSError(errno.ENOLCK, "No locks available")
        flock(fd, operation)

    setattr(fcntl, "flock", refuse)  # noqa: B010


def node(variables: dict[str, str], locks: bool, barrier: Any = None) -> None:
    """Download as a node of its own does."""
    os.environ.update(variables)
    small_units()
    if not locks:
        without_locks(variables["HF_HUB_CACHE"])
    if barrier is not None:
        barrier.wait()
    get(URI)


def start(
    number: int, tmp_path: Path, *, locks: bool = True, barrier: Any = None, hub: str | None = None
) -> Any:
    variables = {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "HF_"))}
    variables["RAYSERVE_HOOKS_LOCK_DIR"] = str(tmp_path / f"locks of {number}")
    if hub is not None:
        variables["HF_HUB_CACHE"] = hub
    process = PROCESSES.Process(target=node, args=(variables, locks, barrier))
    process.start()
    return process


def kill_after(server: s3.Server, process: Any, sent: int) -> None:
    until(lambda: sum(server.sent.values()) >= sent or not process.is_alive(), every_s=0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def join_all(server: s3.Server, model: Path, processes: list[Any]) -> None:
    """Wait for the end of processes, at no moment of which the model may be half."""

    def ended() -> bool:
        assert_never_half(server, model)
        return not any(process.is_alive() for process in processes)

    until(ended)
    server.settle()


class TestSeveralNodes:
    @pytest.mark.slow
    @pytest.mark.parametrize("nodes", [2, 4])
    def test_each_object_is_fetched_once(
        self, nodes: int, server: s3.Server, hub: Path, tmp_path: Path
    ) -> None:
        server.rate = 2_000_000
        barrier = PROCESSES.Barrier(nodes)
        processes = [start(number, tmp_path, barrier=barrier) for number in range(nodes)]
        join_all(server, hub / "models--org--tiny", processes)
        assert [process.exitcode for process in processes] == [0] * nodes
        assert_equal(server, get(URI))
        assert server.sent == {
            f"bucket/model/{file.name}": file.stat().st_size
            for file in (server.root / "bucket" / "model").iterdir()
        }

    @pytest.mark.slow
    def test_one_that_is_killed_is_taken_over_from(
        self, server: s3.Server, hub: Path, tmp_path: Path
    ) -> None:
        server.rate = 1_000_000
        first = start(1, tmp_path)
        until(lambda: sum(server.sent.values()) >= SHARD, every_s=0.001)
        second = start(2, tmp_path)
        kill_after(server, first, 2 * SHARD)
        second.join()
        assert second.exitcode == 0
        server.settle()
        assert_never_half(server, hub / "models--org--tiny")
        total = 4 * SHARD + 2
        # Loopback's buffers are larger than these files: most of what was lost was in them.
        assert total <= sum(server.sent.values()) <= 2 * total

    @pytest.mark.slow
    def test_without_locks_all_succeed_and_nothing_is_half(
        self, server: s3.Server, hub: Path, tmp_path: Path
    ) -> None:
        server.rate = 2_000_000
        barrier = PROCESSES.Barrier(3)
        started = [start(n, tmp_path, locks=False, barrier=barrier) for n in range(3)]
        kill_after(server, started.pop(), SHARD)
        join_all(server, hub / "models--org--tiny", started)
        assert [process.exitcode for process in started] == [0, 0]
        assert_never_half(server, hub / "models--org--tiny")
        assert sum(server.sent.values()) < 3.5 * SHARD * 4

    def test_without_locks_a_wider_mode_of_another_node_is_kept(
        self, tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from rayserve_hooks.download import cache

        store = put(tmp_path / "store", FIRST)
        monkeypatch.setattr(cache, "shared_lock_reaches_other_nodes", lambda _: False)
        link, once = cache._Stage.collect, threading.Event()

        def meanwhile(*arguments: Any) -> Any:
            if not once.is_set():
                once.set()
                monkeypatch.setattr(cache, "_node_name", lambda: "other")
                variables = dict(os.environ)
                script = f"""
                    from rayserve_hooks.context import NodeModelDownloadable
                    from rayserve_hooks.download.model import Mirror, download_node
                    import rayserve_hooks.download.cache as cache
                    cache._node_name = lambda: "third"
                    cache.shared_lock_reaches_other_nodes = lambda _: False
                    cache.folder_lock = __import__("contextlib").nullcontext
                    cache.folder_lock = lambda *_: __import__("contextlib").nullcontext(False)
                    mode = NodeModelDownloadable.MODEL_AND_TOKENIZER
                    download_node("org/tiny", Mirror({store.as_uri()!r}), mode)
                """
                variables["RAYSERVE_HOOKS_LOCK_DIR"] = str(tmp_path / "other locks")
                command = [sys.executable, "-c", textwrap.dedent(script)]
                subprocess.run(command, check=True, env=variables)
            return link(*arguments)

        monkeypatch.setattr(cache._Stage, "collect", meanwhile)
        assert held(get(store, TOKENIZER)) == FIRST


@pytest.mark.slow
def test_a_kill_costs_little_more_than_what_was_in_flight(
    server: s3.Server, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = server.root / "bucket" / "model"
    numbers = random.Random(1)
    for number in range(8):
        (folder / f"{number}.safetensors").write_bytes(numbers.randbytes(8 * 2**20))
    total = 64 * 2**20 + 2
    server.rate = 2_000_000
    variables = {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "HF_"))}
    process = PROCESSES.Process(target=large_node, args=(variables,))
    process.start()
    journals = hub / "models--org--tiny" / ".rayserve_hooks" / "partial"
    until(lambda: sum(segments(journals)) >= total // 2)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not (hub / "models--org--tiny" / "refs").exists()
    found = segments(journals)
    # What was in a buffer for each stream is lost, and the store has sent nothing else in vain.
    assert max(found) <= 2**20
    server.rate = None
    server.forget()
    monkeypatch.setattr(partials, "RANGE_BYTES", 16 * 2**20)
    assert_equal(server, get(URI))
    assert sum(server.sent.values()) == total - 2 - sum(found)


def segments(journals: Path) -> list[int]:
    lines = [
        line
        for path in journals.glob("*.journal")
        for line in partials._LINE.findall(path.read_bytes())
    ]
    return [int(end) - int(start) for start, end, _ in lines]


def large_node(variables: dict[str, str]) -> None:
    os.environ.update(variables)
    get(URI)


@contextlib.contextmanager
def mounted(*arguments: str, at: Path) -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", *arguments, str(at)], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"this machine does not let root mount: {done.stderr.strip()}")
    try:
        yield at
    finally:
        end_uses()
        subprocess.run(["umount", str(at)], check=True)


def as_user(user: int, uri: str, variables: dict[str, str], answer: Any) -> None:
    """Ask as another user, once all is imported that this user may not read."""
    os.environ.update(variables)
    with tempfile.TemporaryDirectory() as other:
        os.environ |= {"HF_HUB_CACHE": other, "RAYSERVE_HOOKS_LOCK_DIR": f"{other}/locks"}
        get(uri)
        end_uses()
    os.environ.update(variables)
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    try:
        answer.send(str(get(uri)))
    except DownloadError as error:
        answer.send(f"ERROR {error}")


def again(uri: str, user: int, **variables: str) -> str:
    """Ask in another process, perhaps another user's; return the path, or the error."""
    variables = {"HF_HUB_CACHE": os.environ["HF_HUB_CACHE"], **variables}
    answer, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=as_user, args=(user, uri, variables, theirs))
    process.start()
    theirs.close()
    found = str(answer.recv())
    process.join()
    return found


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can reach, which pytest's are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


class TestReadOnly:
    @needs_root
    def test_a_complete_cache_serves_processes_of_all_users(
        self, public: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        store = put(public / "store", FIRST)
        monkeypatch.setenv("HF_HUB_CACHE", str(public / "hub"))
        snapshot = get(store)
        shutil.rmtree(tmp_path / "locks")
        with mounted("-o", "bind", str(public / "hub"), at=public / "mount") as mount:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(mount)], check=True)
            expected = str(mount / snapshot.relative_to(public / "hub"))
            monkeypatch.setenv("HF_HUB_CACHE", str(mount))
            assert str(get(store)) == expected
            for user in (0, 65534):
                locks = public / f"locks-{user}"
                locks.mkdir()
                os.chown(locks, user, -1)
                found = again(store.as_uri(), user, RAYSERVE_HOOKS_LOCK_DIR=str(locks))
                assert found == expected
            put(store, SECOND)
            with pytest.raises(DownloadError, match=r"^cannot write .*Read-only file system"):
                get(store)
        assert held(snapshot) == FIRST

    @needs_root
    def test_one_whose_records_or_name_are_lost_serves_too(
        self, public: Path, monkeypatch: pytest.MonkeyPatch, server: s3.Server
    ) -> None:
        server.etags = "md5"
        monkeypatch.setenv("HF_HUB_CACHE", str(public / "hub"))
        snapshot = get(URI)
        model = snapshot.parents[1]
        shutil.rmtree(model / ".rayserve_hooks")
        (model / "refs" / "main").write_text("other")
        with mounted("-o", "bind", str(public / "hub"), at=public / "mount") as mount:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(mount)], check=True)
            monkeypatch.setenv("HF_HUB_CACHE", str(mount))
            server.forget()
            assert_equal(server, get(URI))
            assert server.count("GET") == 0

    def test_asking_again_writes_nothing(self, hub: Path, tmp_path: Path) -> None:
        store = put(tmp_path / "store", FIRST)
        get(store)

        def state() -> list[tuple[str, int, int]]:
            paths = [hub, *sorted(hub.rglob("*"))]
            return [(str(p), p.stat().st_mtime_ns, p.stat().st_ctime_ns) for p in paths]

        before = state()
        get(store)
        get(store, TOKENIZER)
        assert state() == before


@needs_root
class TestSeveralUsers:
    @pytest.mark.parametrize("first", [0, 65534])
    def test_a_cache_that_both_may_write(
        self, first: int, public: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = put(public / "store", FIRST)
        for name in ("hub", "locks"):
            (public / name).mkdir()
            (public / name).chmod(0o777)
        shared = {
            "HF_HUB_CACHE": str(public / "hub"),
            "RAYSERVE_HOOKS_LOCK_DIR": str(public / "locks"),
        }
        users = [first, 65534 - first]
        for files in (FIRST, SECOND):
            put(store, files)
            for user in users:
                found = again(store.as_uri(), user, **shared)
                if found.startswith("ERROR"):
                    # Another user's folder, whose mode lets nobody else in.
                    assert user == 65534
                    assert first == 0
                    assert "Permission denied" in found
                else:
                    assert held(Path(found)) == files
            users.reverse()


class TestVariables:
    @pytest.mark.parametrize(
        ("variables", "folder"),
        [
            ({"HF_HUB_CACHE": "{}/a"}, "a"),
            ({"HUGGINGFACE_HUB_CACHE": "{}/b"}, "b"),
            ({"HF_HOME": "{}/c"}, "c/hub"),
            ({"XDG_CACHE_HOME": "{}/d"}, "d/huggingface/hub"),
            ({"HF_HOME": "~/e"}, "e/hub"),
            ({"HF_HUB_CACHE": "$HOME/f"}, "f"),
            ({"HF_HUB_CACHE": "${HOME}/f/${HF_HOME}", "HF_HOME": "g"}, "f/g"),
            ({"HF_HUB_CACHE": "", "HUGGINGFACE_HUB_CACHE": "", "HF_HOME": "{}/h"}, "h/hub"),
            ({"HF_HUB_CACHE": "{}/i", "HF_HOME": "{}/j", "XDG_CACHE_HOME": "{}/k"}, "i"),
            ({"HF_HOME": "{}/l", "XDG_CACHE_HOME": "{}/m"}, "l/hub"),
        ],
    )
    def test_they_are_read_when_they_are_used(
        self,
        variables: dict[str, str],
        folder: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        import huggingface_hub.constants  # noqa: F401 - which has read them now

        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("HF_HUB_CACHE")
        for name, value in variables.items():
            monkeypatch.setenv(name, value.format(tmp_path) if "{}" in value else value)
        assert model_folder("org/tiny") == tmp_path / folder / "models--org--tiny"

    def test_without_any_it_is_where_the_library_looks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in VARIABLES:
            monkeypatch.setenv(name, "")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        assert model_folder("org/tiny") == tmp_path / "models--org--tiny"

    @pytest.mark.parametrize("name", [*VARIABLES, "all"])
    def test_an_empty_one_is_unset_for_the_library_too(self, name: str, tmp_path: Path) -> None:
        # Its import takes an empty one for the current folder, so this is a process of its own.
        others = {key: value for key, value in os.environ.items() if key not in VARIABLES}
        empty = dict.fromkeys(VARIABLES if name == "all" else [name], "")
        code = "from rayserve_hooks.download.model import model_folder; print(model_folder('a/b'))"
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env={**others, **empty, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        folder = tmp_path / ".cache/huggingface/hub/models--a--b"
        assert ran.stdout.strip() == str(folder)

    def test_downloads_from_the_hub_go_there_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Any] = []
        monkeypatch.setattr(
            "huggingface_hub.snapshot_download",
            lambda model_id, **options: asked.append((model_id, options["cache_dir"])),
        )
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "late"))
        download_node("org/tiny", None, ALL, from_hub=True)
        assert asked == [("org/tiny", tmp_path / "late")]


@pytest.mark.parametrize("model_id", ["m" * 300, "org/" + "é" * 150])
@pytest.mark.parametrize("from_hub", [True, False])
def test_a_model_id_that_is_too_long_is_an_error_in_words(
    model_id: str, from_hub: bool, tmp_path: Path, hub: Path
) -> None:
    mirror = None if from_hub else Mirror(put(tmp_path / "store", FIRST).as_uri())
    with pytest.raises(DownloadError, match=r"is too long to name a folder: .*; shorten it$"):
        download_node(model_id, mirror, ALL, from_hub=from_hub)
    assert not hub.exists()


def test_an_object_of_an_absurd_size_is_refused_at_once(server: s3.Server, tmp_path: Path) -> None:
    source = stores.open_source(URI)
    files = [stores.RemoteFile("huge", 10**15, '"1"', "1"), *source.list_files().values()]
    for folder in ("files", "state"):
        (tmp_path / folder).mkdir()
    started = time.process_time()
    with pytest.raises(DownloadError, match=r"bytes free, but 1,0\d\d,\d+,\d+,\d+,\d+ are needed"):
        transfer.fetch(
            Heads(source), files, tmp_path / "files", tmp_path / "state", lambda *_: None
        )
    assert time.process_time() - started < 1
    assert server.count("GET") == 0


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize("harsh", [True, False])
def test_crash_images(
    harsh: bool, server: s3.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the disk at some moment, as after a power cut, is resumed to the store's bytes.

    The harsh disk has journals and logs at once, and the sizes of files, but not their bytes.
    """
    image, disk = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(128 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    folder = server.root / "bucket" / "model"
    numbers = random.Random(2)
    for number in range(4):
        # Of different sizes: some are in the stage when the last ones come.
        data = numbers.randbytes((number + 1) * 2**20)
        (folder / f"{number}.safetensors").write_bytes(data)
    server.rate = 300_000
    copies: list[Path] = []

    def copy() -> None:
        copied = tmp_path / f"copy-{len(copies)}"
        subprocess.run(["cp", "--sparse=always", str(image), str(copied)], check=True)
        copies.append(copied)

    options = "loop,commit=1" + (",nodelalloc,data=writeback" if harsh else "")
    with mounted("-o", options, str(image), at=disk):
        process = start(1, tmp_path, hub=str(disk / "hub"))
        state = disk / "hub" / "models--org--tiny" / ".rayserve_hooks"
        while process.is_alive():
            process.join(0.3)
            if harsh:
                for log in [*state.glob("partial/*.journal"), *state.glob("stage.jsonl")]:
                    sync(log)
            elif len(copies) % 3 == 1:
                subprocess.run(["sync", "-f", str(disk)], check=True)
            copy()
            if harsh and (state.parent / "snapshots").exists():
                copies.pop()  # such a disk may lose bytes of any file, whoever wrote it
        process.join()
        assert process.exitcode == 0
        for _ in range(0 if harsh else 3):
            copy()
            time.sleep(0.7)
    server.rate = None
    interrupted = 0
    for number, copied in enumerate(copies):
        with mounted("-o", "loop", str(copied), at=tmp_path / f"disk-{number}") as crashed:
            monkeypatch.setenv("HF_HUB_CACHE", str(crashed / "hub"))
            interrupted += bool(list(crashed.rglob("*.journal")))
            assert_equal(server, get(URI))
    assert interrupted > 1


def sync(file: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
