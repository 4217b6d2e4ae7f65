"""What the cluster gives to a download, without a cluster."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from rayserve_hooks.cluster import _ray
from rayserve_hooks.cluster.download_stage import download_caller
from rayserve_hooks.context import LOGGER_NAME, NodeModelDownloadable
from rayserve_hooks.core import threads
from rayserve_hooks.download.model import Mirror, download_node

MODEL = "org/tiny"
FOREVER = 30  # no test waits so long unless it fails


class Bar:
    """Stands in for ``ray.experimental.tqdm_ray.tqdm``."""

    def __init__(self, **options: Any) -> None:
        self.n, self.options, self.closed = 0, options, False

    def update(self, n: int) -> None:
        self.n += n

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    made: list[Bar] = []

    def tqdm(**options: Any) -> Bar:
        made.append(Bar(**options))
        return made[-1]

    fake = types.SimpleNamespace(tqdm_ray=types.SimpleNamespace(tqdm=tqdm))
    monkeypatch.setitem(sys.modules, "ray.experimental", fake)
    return made


def test_who_calls_is_told_how_many_bytes_came(source: Path) -> None:
    fetched: list[int] = []
    for _ in range(2):  # the second time all is there
        caller = download_caller(MODEL, fetched=fetched.append)
        mode = NodeModelDownloadable.MODEL_AND_TOKENIZER
        download_node(MODEL, Mirror(source.as_uri()), mode, caller=caller)
    assert sum(fetched) == 1002


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("RAYSERVE_HOOKS_LOCK_DIR", str(tmp_path / "locks"))
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("watched", "terminal"), [("1", False), ("0", True), (None, True), (None, False)]
)
def test_a_bar_is_shown_if_a_person_watches(
    watched: str | None,
    terminal: bool,
    bars: list[Bar],
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    if watched is None:
        monkeypatch.delenv("RAYSERVE_HOOKS_PROGRESS", raising=False)
    else:
        monkeypatch.setenv("RAYSERVE_HOOKS_PROGRESS", watched)
    everything = NodeModelDownloadable.MODEL_AND_TOKENIZER
    download_node(MODEL, Mirror(source.as_uri()), everything, caller=download_caller(MODEL))
    if watched == "0" or (watched is None and not terminal):
        assert bars == []
        return
    total = 1000 + 2
    assert [(bar.n, bar.closed, bar.options["total"]) for bar in bars] == [(total, True, total)]
    assert (bars[0].options["desc"], bars[0].options["unit"]) == (source.as_uri(), "B")


def test_the_logger_is_the_package_s_within_serve() -> None:
    assert download_caller(MODEL).logger.name == LOGGER_NAME


def test_the_label_is_the_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert download_caller(MODEL).label == MODEL
    monkeypatch.setattr(_ray, "deployment_name", lambda model_id: f"app/LLM of {model_id}")
    assert download_caller(MODEL).label == f"app/LLM of {MODEL}"


def test_it_is_cancelled_with_the_initialization() -> None:
    began = threading.Event()
    said: concurrent.futures.Future[str] = concurrent.futures.Future()

    def work() -> None:
        caller = download_caller(MODEL)
        caller.check_cancelled()
        began.set()
        until(threads.given_up)
        with pytest.raises(asyncio.CancelledError) as cancelled:
            caller.check_cancelled()
        said.set_result(str(cancelled.value))

    async def initialize() -> None:
        working = asyncio.create_task(threads.run_in_thread(work))
        assert await asyncio.to_thread(began.wait, FOREVER)
        working.cancel()
        await working

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(initialize())
    assert said.result(FOREVER) == "this initialization was given up"
