"""Callbacks written for Ray's own slot stack unchanged next to ours."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import s3

import rayserve_hooks
from rayserve_hooks import CallbackCtx, Handled, HookError, NodeModelDownloadable

pytestmark = pytest.mark.ray

EVERYTHING = {"callback": "ray_callbacks:Everything", "kwargs": {"greeting": "hello"}}
DOWNLOADER = "ray.llm._internal.common.callbacks.cloud_downloader:CloudDownloader"


@pytest.fixture(autouse=True)
def _cluster(ray_cluster: Any) -> None:
    pass


def make(*callbacks: Any) -> Any:
    return rayserve_hooks.LLMConfig(
        model_id="tiny",
        callbacks=callbacks,
        placement_group_config={"bundles": [{"CPU": 1}]},
    )


def initialize(*callbacks: Any) -> CallbackCtx:
    from ray.util.placement_group import remove_placement_group

    ctx = asyncio.run(rayserve_hooks.initialize_node(make(*callbacks)))
    remove_placement_group(ctx.placement_group)
    return ctx


def test_its_methods_run_where_ours_would() -> None:
    ctx = initialize("lifecycle_callbacks:Last", EVERYTHING, "lifecycle_callbacks:First")
    assert [(call.hook, call.callback) for call in ctx.trace] == [
        ("on_before_init", "First"),
        ("on_before_init", "Everything"),
        ("on_before_init", "Last"),
        ("on_before_download", "First"),
        ("on_before_download", "Everything"),
        ("on_after_init", "Everything"),
        ("on_after_init", "Last"),
    ]
    assert ctx.custom_data["calls"] == [
        "on_before_node_init",
        "on_before_download_model_files_distributed",
        "on_after_node_init",
    ]


def test_what_it_sets_lands_in_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FROM_RAY_CALLBACK", raising=False)
    ctx = initialize(EVERYTHING)
    assert ctx.local_node_download_model is NodeModelDownloadable.NONE
    assert ctx.worker_node_download_model is NodeModelDownloadable.NONE
    assert ctx.runtime_env["env_vars"]["FROM_RAY_CALLBACK"] == "1"
    assert (ctx.custom_data["greeting"], ctx.custom_data["model_id"]) == ("hello", "tiny")
    assert set(ctx.trace[0].changed) == {
        "local_node_download_model",
        "worker_node_download_model",
        "runtime_env.env_vars.FROM_RAY_CALLBACK",
        "custom_data.calls",
        "custom_data.greeting",
    }


def test_run_init_node_false_takes_over() -> None:
    ctx = initialize("ray_callbacks:TakesOver", "lifecycle_callbacks:Last")
    assert [(call.hook, call.callback, call.outcome) for call in ctx.trace] == [
        ("on_before_init", "TakesOver", "handled"),
        ("on_after_init", "TakesOver", "returned"),
        ("on_after_init", "Last", "returned"),
    ]
    assert ctx.handled == Handled(reason="TakesOver set run_init_node to False")


def test_its_failure_is_a_hook_error() -> None:
    with pytest.raises(
        HookError,
        match=r"callback 'Fails' failed in hook on_before_init on node .*: RuntimeError: no such",
    ):
        initialize("ray_callbacks:Fails")


def test_rays_own_downloader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket" / "extra").mkdir(parents=True)
    (tmp_path / "bucket" / "extra" / "a.txt").write_text("hello")
    paths = [("s3://anonymous@bucket/extra", str(tmp_path / "target"))]
    with s3.serving(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        initialize({"callback": DOWNLOADER, "kwargs": {"paths": paths}})
    assert (tmp_path / "target" / "a.txt").read_text() == "hello"


def test_arguments_its_constructor_does_not_take() -> None:
    with pytest.raises(
        ValueError,
        match=r"callback 'Strict': ray_callbacks.Strict refused kwargs \['paths'\]: got an "
        "unexpected keyword argument 'paths'",
    ):
        make({"callback": "ray_callbacks:Strict", "kwargs": {"paths": []}})


RAY_INSTANCE = (
    "callback 'TakesOver' is an instance of a Ray callback, which belongs to one config and "
    "context; name the class, with its arguments in kwargs"
)


def test_an_instance_of_one_is_refused() -> None:
    from ray_callbacks import TakesOver

    with pytest.raises(ValueError, match=RAY_INSTANCE):
        make(TakesOver(llm_config=make()))


def test_the_adapter_itself_is_refused() -> None:
    text = (
        "callback 'HooksCallback': HooksCallback runs this list and cannot be in it; list the "
        "callbacks themselves"
    )
    with pytest.raises(ValueError, match=text):
        make("rayserve_hooks.HooksCallback")
