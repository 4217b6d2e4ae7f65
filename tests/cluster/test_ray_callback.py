"""Callbacks written for Ray's own slot stack unchanged next to ours."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from typing import Any

import plugins_for_tests
import pytest
import s3
from plugins_for_tests import Plain, refused

import rayserve_hooks
from rayserve_hooks import CallbackCtx, Handled, HookError, NodeModelDownloadable
from rayserve_hooks.cluster.ray_callback import RayCallback, adapt_ray_callback
from rayserve_hooks.cluster.stacks import parse
from rayserve_hooks.core.inspection import hook_functions

on_a_cluster = pytest.mark.ray
imports_ray = pytest.mark.slow

EVERYTHING = {"callback": "ray_callbacks:Everything", "kwargs": {"greeting": "hello"}}
DOWNLOADER = "ray.llm._internal.common.callbacks.cloud_downloader:CloudDownloader"


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


@on_a_cluster
@pytest.mark.usefixtures("ray_cluster")
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


@on_a_cluster
@pytest.mark.usefixtures("ray_cluster")
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


@on_a_cluster
@pytest.mark.usefixtures("ray_cluster")
def test_run_init_node_false_takes_over() -> None:
    ctx = initialize("ray_callbacks:TakesOver", "lifecycle_callbacks:Last")
    assert [(call.hook, call.callback, call.outcome) for call in ctx.trace] == [
        ("on_before_init", "TakesOver", "handled"),
        ("on_before_init", "Last", "skipped"),
        ("on_before_download", "TakesOver", "skipped"),
        ("on_after_init", "TakesOver", "returned"),
        ("on_after_init", "Last", "returned"),
    ]
    assert ctx.handled == Handled(reason="TakesOver set run_init_node to False")


@on_a_cluster
@pytest.mark.usefixtures("ray_cluster")
def test_its_failure_is_a_hook_error() -> None:
    with pytest.raises(
        HookError,
        match=r"callback 'Fails' failed in hook on_before_init on node .*: RuntimeError: no such",
    ):
        initialize("ray_callbacks:Fails")


@on_a_cluster
@pytest.mark.usefixtures("ray_cluster")
def test_rays_own_downloader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket" / "extra").mkdir(parents=True)
    (tmp_path / "bucket" / "extra" / "a.txt").write_text("hello")
    paths = [("s3://anonymous@bucket/extra", str(tmp_path / "target"))]
    with s3.serving(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        initialize({"callback": DOWNLOADER, "kwargs": {"paths": paths}})
    assert (tmp_path / "target" / "a.txt").read_text() == "hello"


def build(callback: object) -> object:
    ((_, plugin),) = parse([callback], None, "raise").build()
    return plugin


def ray_callback(name: str) -> Any:
    return getattr(importlib.import_module("ray_callbacks"), name)


@imports_ray
@pytest.mark.parametrize("by", ["string", "class"])
def test_a_class_of_rays_kind_is_adapted_but_not_built(by: str) -> None:
    target = "ray_callbacks:Everything" if by == "string" else ray_callback("Everything")
    plugin = build({"callback": target, "kwargs": {"greeting": "hello"}})
    assert type(plugin) is RayCallback
    assert [hook.attribute for hook in hook_functions(plugin)] == [
        "on_after_init",
        "on_before_download",
        "on_before_init",
    ]


@imports_ray
def test_arguments_its_constructor_does_not_take() -> None:
    with refused(
        "callback 'Strict': ray_callbacks.Strict(llm_config: 'Any', raise_error_on_callback: "
        "'bool', ctx_kwargs: 'Any') refused kwargs ['paths']: TypeError: got an unexpected keyword "
        "argument 'paths'; drop it"
    ):
        build({"callback": "ray_callbacks:Strict", "kwargs": {"paths": []}})


@imports_ray
def test_an_argument_that_its_constructor_needs() -> None:
    with refused("callback 'NeedsPaths': ray_callbacks.NeedsPaths(") as caught:
        build("ray_callbacks:NeedsPaths")
    assert str(caught.value).endswith(" lacks 'paths'; add it, as in kwargs: {paths: ...}")
    assert type(build({"callback": "ray_callbacks:NeedsPaths", "kwargs": {"paths": []}})) is (
        RayCallback
    )


@imports_ray
@pytest.mark.parametrize(
    ("method", "hint"),
    [
        ("on_before_node_int", "; did you mean 'on_before_node_init'?"),
        ("on_after_node_inits", "; did you mean 'on_after_node_init'?"),
        ("on_before_init", "; name it 'on_before_node_init'"),
        ("on_before_download", "; name it 'on_before_download_model_files_distributed'"),
    ],
)
def test_a_misspelt_method(method: str, hint: str) -> None:
    base = ray_callback("Everything")
    cls = type("Misspelt", (base,), {method: lambda self: None, "on_message": len, "helper": len})
    with refused(f"callback 'Misspelt': method {method!r} is none that Ray calls{hint}"):
        build(cls)


@imports_ray
@pytest.mark.parametrize("name", ["TakesOver", "Strict"])
def test_an_instance_of_one_is_refused(name: str) -> None:
    instance = ray_callback(name).__new__(ray_callback(name))
    with refused(
        f"callback {name!r} is an instance of a Ray callback, which belongs to one config and "
        "context; name the class, with its arguments in kwargs"
    ):
        build(instance)


@imports_ray
@pytest.mark.parametrize("target", ["rayserve_hooks.HooksCallback", "rayserve_hooks:HooksCallback"])
def test_the_adapter_itself_is_refused(target: str) -> None:
    with refused(
        "callback 'HooksCallback': HooksCallback runs this list and cannot be in it; list the "
        "callbacks themselves"
    ):
        build(target)


@pytest.mark.parametrize("found", [Plain, Plain(), plugins_for_tests])
def test_anything_else_is_left_alone(found: object) -> None:
    assert adapt_ray_callback(found, {}) is None
