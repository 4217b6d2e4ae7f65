"""One node's part of an initialization, without a cluster."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from plugins_for_tests import make_ctx, make_manager

from rayserve_hooks.cluster import node
from rayserve_hooks.cluster.travel import ModelSource
from rayserve_hooks.context import CallbackCtx, Handled, NodeInfo, NodeModelDownloadable, NodeResult
from rayserve_hooks.core import threads
from rayserve_hooks.core.limits import TimeLimits
from rayserve_hooks.core.manager import PluginManager
from rayserve_hooks.download import model
from rayserve_hooks.download.model import Mirror
from rayserve_hooks.errors import HookError, Phase

HERE = "on node n1 (10.0.0.1)"


class Takes:
    def on_before_download(self, ctx: CallbackCtx) -> Handled:
        return Handled("org/brought")


class Assigns:
    def __init__(self, field: str) -> None:
        self.field = field

    def on_before_download(self, ctx: CallbackCtx) -> None:
        setattr(ctx, self.field, "TOKENIZER_ONLY")


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Note each default download instead of doing it."""
    noted: list[dict[str, Any]] = []

    def download(model_id: str, mirror: object, mode: object, **options: Any) -> str:
        noted.append({"model_id": model_id, "mode": mode, "from_hub": options["from_hub"]})
        return "/downloaded"

    monkeypatch.setattr(model, "download_node", download)
    return noted


def initialize(manager: PluginManager, ctx: CallbackCtx) -> tuple[NodeResult, list[Phase]]:
    phases: list[Phase] = []
    stage = node.initialize_this_node(
        manager, ctx, ModelSource("org/m", Mirror("s3://bucket/m")), phases.append
    )
    return asyncio.run(stage), phases


def test_a_result_of_the_hook_replaces_the_download(downloads: list[dict[str, Any]]) -> None:
    ctx = make_ctx()
    result, phases = initialize(make_manager(Takes), ctx)
    assert (result.node, result.model_path, result.handled) == (
        ctx.node,
        "org/brought",
        Handled("org/brought"),
    )
    assert result.download_s == 0.0
    assert phases == ["before download"]
    assert downloads == []


def test_without_one_the_download_follows(downloads: list[dict[str, Any]]) -> None:
    result, phases = initialize(make_manager(), make_ctx())
    assert (result.model_path, result.handled) == ("/downloaded", None)
    assert phases == ["before download", "download"]
    assert downloads == [
        {
            "model_id": "org/m",
            "mode": NodeModelDownloadable.MODEL_AND_TOKENIZER,
            "from_hub": False,
        }
    ]


@pytest.mark.parametrize(("is_local", "field"), [(True, "local"), (False, "worker")])
def test_each_kind_of_node_has_its_download_mode(
    is_local: bool, field: str, downloads: list[dict[str, Any]]
) -> None:
    here = NodeInfo("n1", "10.0.0.1", is_local=is_local)
    ctx = make_ctx(node=here, **{f"{field}_node_download_model": "NONE"})
    initialize(make_manager(), ctx)
    assert [download["mode"] for download in downloads] == [NodeModelDownloadable.NONE]


@pytest.mark.parametrize(("field", "assigned"), [("local", True), ("worker", False)])
def test_a_mode_that_a_callback_has_assigned_asks_the_hub_too(
    field: str, assigned: bool, downloads: list[dict[str, Any]]
) -> None:
    callback = {"callback": Assigns, "kwargs": {"field": f"{field}_node_download_model"}}
    initialize(make_manager(callback), make_ctx())
    assert [download["from_hub"] for download in downloads] == [assigned]


def test_a_mode_assigned_outside_of_a_hook_does_not(downloads: list[dict[str, Any]]) -> None:
    ctx = make_ctx()
    ctx.local_node_download_model = "TOKENIZER_ONLY"
    initialize(make_manager(), ctx)
    assert [(d["mode"].name, d["from_hub"]) for d in downloads] == [("TOKENIZER_ONLY", False)]


def test_a_download_that_fails_names_the_node_and_no_callback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*args: object, **options: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(model, "download_node", fails)
    with pytest.raises(HookError) as caught:
        initialize(make_manager(), make_ctx())
    assert str(caught.value) == (
        f"node initialization failed {HERE} (phase: download): OSError: disk full"
    )
    assert type(caught.value.__cause__) is OSError


def test_a_download_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async def waits() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(model, "download_node", lambda *_, **__: threads.run_coroutine(waits()))
    manager = make_manager(time_limits=TimeLimits(download=0.05))
    text = r"\(phase: download\): not done after 0.05 s, the time limit 'download'"
    with pytest.raises(HookError, match=text):
        initialize(manager, make_ctx())


@pytest.mark.parametrize(
    ("path", "exists"),
    [
        ("gpt2", True),
        ("org/model-7B_v1.0", True),
        ("s3://bucket/a/b", True),
        ("gs://bucket", True),
        ("/", True),
        (Path(__file__), True),
        (Path("no/such"), False),
        ("/no/such", False),
        ("no/such/folder", False),
        ("../no", False),
        ("./no", False),
        ("~/no", False),
        ("file:///no/such", False),
        ("FILE:///no/such", False),
        ("gpt2\n", False),
        ("org/model/", False),
        ("C:\\no", False),
        ("no\0such", False),
        ("a" * 5000 + "/b/c", False),
    ],
)
def test_a_path_must_be_there_and_an_id_need_not(path: str | Path, exists: bool) -> None:
    check = node.check_brought(Handled(path), "on_before_download", make_ctx())
    if exists:
        asyncio.run(check)
        return
    with pytest.raises(HookError, match=r"Handled\(model_path='.*'\) names nothing that is there"):
        asyncio.run(check)
