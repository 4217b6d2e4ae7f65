from __future__ import annotations

import io
import json
import os
import stat
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plugins_for_tests import refused

from rayserve_hooks import CallbackCtx
from rayserve_hooks.impls import _archive, compile_cache
from rayserve_hooks.impls.compile_cache import VARIABLE, CompileCache
from rayserve_hooks.testing import ModelConfig, Outcome, RunStack

KEY = "a key of sixteen bytes or more"
AOT = "torch_compile_cache/torch_aot_compile"


class Compiles:
    """Writes in the engine core what vLLM 0.29 writes there, unless it is there."""

    def __init__(self, key: str, factors: Any) -> None:
        self.key, self.factors = key, factors

    def on_before_engine_init(self, ctx: CallbackCtx) -> None:
        if ctx.process.role != "engine core":
            return
        root = Path(os.environ[VARIABLE])
        artifact = root / AOT / self.key / "rank_0_0" / "model"
        if artifact.exists():
            artifact.read_bytes()
            return
        artifact.parent.mkdir(parents=True)
        artifact.write_bytes(b"code of " + self.key.encode())
        info = root / "modelinfos" / "llama.json"
        info.parent.mkdir(exist_ok=True)
        info.write_text("{}")
        if self.factors is not None:
            described = root / "torch_compile_cache" / self.key[:10] / "rank_0_0" / "backbone"
            described.mkdir(parents=True)
            content = {"env": self.factors, "config_hash": "c", "code_hash": "d"}
            (described / "cache_key_factors.json").write_text(json.dumps(content))


class Unmounts:
    """Removes a store once the replica, which comes first, has looked into it."""

    def __init__(self, store: str) -> None:
        self.store = Path(store)

    def on_before_engine_init(self, ctx: CallbackCtx) -> None:
        if ctx.process.role == "replica":
            self.store.rmdir()


class Machine:
    """A machine with its own folder, on which replicas start that share a store."""

    def __init__(self, run_stack: RunStack, folder: Path, **arguments: Any) -> None:
        self._run_stack = run_stack
        self.folder = folder / "cache"
        arguments = {"key_variable": "CACHE_KEY", "folder": str(self.folder), **arguments}
        self.callback = {"callback": CompileCache, "kwargs": arguments}

    def start(
        self, vllm_key: str = "k1", factors: Any = None, *more: object, **engine_kwargs: Any
    ) -> Outcome:
        """Run a replica; its engine compiles unless the cache has what its key names."""
        compiles = {"callback": Compiles, "kwargs": {"key": vllm_key, "factors": factors}}
        outcome = self._run_stack(
            [self.callback, *([compiles] if vllm_key else []), *more], config(**engine_kwargs)
        ).assert_succeeded()
        self.root = Path(outcome.runtime_env["env_vars"][VARIABLE])
        return outcome


def config(runtime_env: Any = None, **engine_kwargs: Any) -> ModelConfig:
    return ModelConfig(
        "org/tiny",
        accelerator_type="L4",
        engine_kwargs={"max_model_len": 128, **engine_kwargs},
        runtime_env=runtime_env or {},
    )


def said(*outcomes: Outcome) -> str:
    return "\n".join(line for outcome in outcomes for line in outcome.logged("CompileCache"))


Machines = Callable[..., Machine]


@pytest.fixture
def machine(run_stack: RunStack, tmp_path: Path, store: Path) -> Machines:
    """Return what makes a machine of a name."""
    return lambda name, **arguments: Machine(
        run_stack, tmp_path / name, **{"store": str(store), **arguments}
    )


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Return what is counted, instead of starting Ray's metrics."""
    found: list[tuple[str, list[str]]] = []
    monkeypatch.setenv("CACHE_KEY", KEY)
    monkeypatch.setattr(
        compile_cache, "_count", lambda ctx, result, why: found.append((result, list(why)))
    )
    return found


def archives(store: Path) -> list[Path]:
    return sorted(store.glob("*.archive"))


def test_what_one_machine_has_compiled_another_restores(
    machine: Machines, store: Path, counted: Any
) -> None:
    first, second = machine("one"), machine("two")
    compiled = first.start()
    assert [path.suffix for path in sorted(store.iterdir())] == [".archive", ".json"]
    restored = second.start()
    again = second.start()  # on the same machine: nothing is read
    assert counted == [("miss", ["first start"]), ("hit", []), ("hit", [])]
    assert len(archives(store)) == 1
    assert (second.root / AOT / "k1" / "rank_0_0" / "model").read_bytes() == b"code of k1"
    log = said(compiled, restored, again)
    assert log.count("restored the compile cache: 2 folders of 1 archives") == 1
    assert "compile cache: miss; the store holds no archive yet" in log
    assert stat.S_IMODE(second.root.stat().st_mode) == 0o700


def test_only_the_first_process_of_a_node_looks_into_the_store(
    machine: Machines, store: Path
) -> None:
    one = machine("one")
    first = one.start("", None, {"callback": Unmounts, "kwargs": {"store": str(store)}})
    assert [call.process for call in first.calls("CompileCache", "on_before_engine_init")] == [
        "replica",
        "engine core",
    ]
    assert "not restored" not in said(first)
    assert said(one.start("")).count("the compile cache was not restored: ") == 1


def test_the_folder_is_the_deployments_and_set_where_the_app_is_built(machine: Machines) -> None:
    one = machine("one")
    outcome, other = one.start(), one.start(max_num_seqs=3)
    built = outcome.config.runtime_env["env_vars"]
    assert built == outcome.runtime_env["env_vars"]
    assert built.keys() == {VARIABLE}
    assert built[VARIABLE].startswith(f"{one.folder}/org-tiny-")
    assert other.runtime_env["env_vars"][VARIABLE] != built[VARIABLE]


def test_a_folder_that_somebody_else_sets_is_an_error_that_says_what_to_do(
    run_stack: RunStack, machine: Machines
) -> None:
    taken = config(runtime_env={"env_vars": {VARIABLE: "/mine/vllm"}})
    text = "runtime_env sets VLLM_CACHE_ROOT to '/mine/vllm', which this callback owns; drop it, "
    outcome = run_stack(machine("one").callback, taken)
    outcome.assert_failed(f"{text}or give folder='/mine'", hook="on_configure")


def test_a_miss_names_the_engine_argument_that_differs(
    machine: Machines, store: Path, counted: Any
) -> None:
    machine("one").start()
    outcome = machine("two").start("k2", max_model_len=256)
    assert counted[-1] == ("miss", ["engine argument"])
    assert (
        "compile cache: miss; the store holds no archive of this: engine argument max_model_len "
        "was 128 and is 256" in said(outcome)
    )
    assert len(archives(store)) == 2


def test_a_secret_argument_that_differs_is_masked(machine: Machines, store: Path) -> None:
    machine("one").start(hf_token="hunter2hunter2")
    outcome = machine("two").start("k2", max_model_len=256)
    assert "engine argument hf_token was *** and is absent" in said(outcome)
    assert all("hunter2" not in path.read_text(errors="replace") for path in store.iterdir())


def test_a_miss_by_vllms_own_key_is_explained_by_what_vllm_wrote_down(
    machine: Machines, store: Path, counted: Any
) -> None:
    machine("one").start("k1", {"VLLM_PORTS": "1", "VLLM_API_KEY": "a" * 9})
    outcome = machine("two").start("k2", {"VLLM_PORTS": "2", "VLLM_API_KEY": "b" * 9})
    assert counted[-1] == ("miss", ["variable VLLM_PORTS"])
    assert "compile cache: miss; variable VLLM_PORTS was '1' and is '2'" in said(outcome)
    (line,) = (line for line in said(outcome).splitlines() if "miss" in line)
    assert line.startswith("WARNING: ")  # an archive that was restored and never hit
    assert len(archives(store)) == 2  # both are restored by the next start
    third = machine("three")
    third.start("k2")
    assert counted[-1] == ("hit", [])


def test_a_miss_by_vllms_own_key_is_explained_by_its_variables(
    machine: Machines,
    store: Path,
    counted: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def variables(ports: str) -> None:
        factors = {"VLLM_PORTS": ports, "VLLM_API_KEY": ports * 9}
        fake = SimpleNamespace(compile_factors=lambda: factors)
        monkeypatch.setitem(sys.modules, "vllm.envs", fake)

    variables("1")
    machine("one").start("k1")
    variables("2")
    second = machine("two")
    outcome = second.start("k2")
    assert counted[-1] == ("miss", ["variable VLLM_PORTS"])
    assert "compile cache: miss; variable VLLM_PORTS was '1' and is '2'" in said(outcome)
    variables("3")
    second.start("k3")  # on the same machine, where the archive was restored before
    assert counted[-1] == ("miss", ["variable VLLM_PORTS"])


def test_a_cache_that_vllm_never_writes_is_a_warning(
    machine: Machines, store: Path, counted: Any
) -> None:
    machine("one").start()
    outcome = machine("two").start("", enforce_eager=True)
    assert counted[-1] == ("inert", ["inert"])
    text = "compile cache: inert; vLLM has written no compile cache"
    assert f"WARNING: {text}" in said(outcome)


def test_an_archive_that_the_engine_never_reads_is_a_warning(
    machine: Machines, store: Path, counted: Any
) -> None:
    machine("one").start()
    outcome = machine("two").start("")
    assert counted[-1] == ("inert", ["inert"])
    assert "inert; the engine has read none of the 1 files that were there" in said(outcome)


def forged(store: Path, member: tarfile.TarInfo, key: bytes) -> None:
    """Replace the one archive by one with another member, signed with a key."""
    (path,) = archives(store)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(member, io.BytesIO(b"x" * member.size))
    data = buffer.getvalue()
    signature = _archive._signature(data, path.name, key)
    path.write_bytes(_archive.MAGIC + signature + data)


def member(name: str, kind: bytes = tarfile.REGTYPE, to: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, to
    found.size = 1 if kind == tarfile.REGTYPE else 0
    return found


@pytest.mark.parametrize(
    "forgery",
    [
        (member(f"{AOT}/k1/rank_0_0/model"), b"the key of somebody else", "is not of this key"),
        (member(f"{AOT}/k1/rank_0_0/model"), b"", "is not of this key"),
        (member("../outside"), KEY.encode(), "no plain file of a compile cache"),
        (member("/tmp/outside"), KEY.encode(), "no plain file of a compile cache"),
        (member(f"{AOT}/../../../x"), KEY.encode(), "no plain file of a compile cache"),
        (member(f"{AOT}/k1/rank_0_0/l", tarfile.SYMTYPE, "/etc"), KEY.encode(), "no plain file"),
        (member(f"{AOT}/k1/rank_0_0/l", tarfile.LNKTYPE, "model"), KEY.encode(), "no plain file"),
        (member(f"{AOT}/k1/rank_0_0/l", tarfile.FIFOTYPE), KEY.encode(), "no plain file"),
        (member("elsewhere/k1/rank_0_0/model"), KEY.encode(), "no plain file of a compile cache"),
    ],
)
def test_nothing_is_unpacked_that_is_not_proved_ours(
    machine: Machines,
    tmp_path: Path,
    store: Path,
    forgery: tuple[tarfile.TarInfo, bytes, str],
) -> None:
    planted, key, text = forgery
    machine("one").start()
    forged(store, planted, key)
    second = machine("two", save=False)
    outcome = second.start("")
    assert "the compile cache was not restored: " in said(outcome)
    assert text in said(outcome)
    assert not (second.root / "torch_compile_cache").exists()
    assert [path.name for path in second.root.iterdir()] == [".rayserve_hooks"]
    assert not (tmp_path / "outside").exists()


def test_an_archive_under_another_name_is_not_ours(machine: Machines, store: Path) -> None:
    machine("one").start()
    (path,) = archives(store)
    path.rename(store / f"{path.name.partition('-')[0]}-0000.archive")
    second = machine("two", save=False)
    second.start("")
    assert not (second.root / "torch_compile_cache").exists()


def test_an_archive_cut_short_is_not_ours(machine: Machines, store: Path) -> None:
    machine("one").start()
    (path,) = archives(store)
    path.write_bytes(path.read_bytes()[:-700])
    second = machine("two", save=False)
    second.start("")
    assert not (second.root / "torch_compile_cache").exists()


def test_a_trusted_store_needs_no_key_and_is_checked(machine: Machines, store: Path) -> None:
    trusted = {"key_variable": None, "trusted_store": True}
    machine("one", **trusted).start()
    second = machine("two", **trusted)
    second.start("")
    assert (second.root / AOT / "k1").is_dir()
    store.chmod(0o777)
    third = machine("three", **trusted)
    outcome = third.start()
    assert said(outcome).count(f"others can write '{store}', so it is no trusted store") == 2 + 1
    assert len(archives(store)) == 1


def test_the_key_may_be_in_a_file(machine: Machines, tmp_path: Path, store: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    of_file = {"key_variable": None, "key_file": str(tmp_path / "key")}
    machine("one", **of_file).start()
    second = machine("two")  # the same key by its variable
    second.start("")
    assert (second.root / AOT / "k1").is_dir()


@pytest.mark.parametrize("key", ["", "short"])
def test_without_a_key_the_service_starts_and_says_what_to_do(
    machine: Machines,
    store: Path,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CACHE_KEY", key)
    outcome = machine("one").start()
    text = "the variable 'CACHE_KEY' holds no key of at least 16 bytes on this node; set it where "
    assert f"{text}Ray is started" in said(outcome)
    assert list(store.iterdir()) == []


def test_a_store_that_is_gone_is_a_warning(machine: Machines, tmp_path: Path) -> None:
    outcome = machine("one", store=str(tmp_path / "gone")).start()
    assert f"file://{tmp_path}/gone is no folder; mount it, or make it" in said(outcome)
    assert "the compile cache was not saved: " in said(outcome)


def test_a_cache_that_holds_a_secret_is_not_uploaded(
    machine: Machines,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", "hunter2-hunter2")
    outcome = machine("one").start("k1", {"VLLM_URL": "x?t=hunter2-hunter2"})
    assert "cache_key_factors.json' holds a secret of this process's environment" in said(outcome)
    assert "hunter2" not in "".join(outcome.log)
    assert list(store.iterdir()) == []


def test_of_several_writers_one_wins(store: Path) -> None:
    from rayserve_hooks.download.objects import ObjectFolder

    ready = threading.Barrier(8)
    won: list[bool] = []

    def write(number: int) -> None:
        with ObjectFolder(store.as_uri()) as folder:
            ready.wait()
            won.append(folder.create("x.archive", bytes([number]) * 100_000))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won.count(True) == 1
    assert [path.name for path in store.iterdir()] == ["x.archive"]
    data = (store / "x.archive").read_bytes()
    assert len(data) == 100_000
    assert len(set(data)) == 1


def test_a_cache_that_is_too_large_is_not_saved(machine: Machines, store: Path) -> None:
    big = os.urandom(2_000_000).hex()
    outcome = machine("one", limit_mb=1).start("k1", {"VLLM_X": big})
    assert "; raise limit_mb" in said(outcome)
    assert list(store.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"store": "here", "trusted_store": True}, "(store='here'): write an absolute folder"),
        (
            {"store": "ftp://x", "trusted_store": True},
            "(store='ftp://x'): write an absolute folder",
        ),
        (
            {"store": "/x"},
            " takes exactly one of key_variable, key_file and trusted",
        ),
        (
            {"store": "/x", "key_variable": "K", "trusted_store": True},
            " takes exactly one of key_variable, key_file and trusted_store=True",
        ),
        (
            {"store": "/x", "key_variable": "K", "folder": "c"},
            "(folder='c'): give an absolute",
        ),
        ({"store": "/x", "key_variable": "K", "limit_mb": 0}, "(limit_mb=0): write more than 0"),
        ({"trusted_store": True}, " has no argument 'store'; add it"),
    ],
)
def test_a_wrong_argument_is_refused_where_the_config_is_made(
    arguments: dict[str, Any], text: str
) -> None:
    with refused(f"CompileCache{text}"):
        CompileCache(**arguments)
