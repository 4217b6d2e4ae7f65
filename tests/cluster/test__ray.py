"""The adapter on the installed Ray; that Ray's names are where they are expected is
tests/scripts/test_probe.py."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from waiting import until

from rayserve_hooks import NodeModelDownloadable
from rayserve_hooks.cluster import _ray

pytestmark = pytest.mark.ray


def test_importing_the_adapter_imports_no_ray() -> None:
    import subprocess

    code = "import sys, rayserve_hooks.cluster._ray; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_adapter_exports_one_class_of_ray_and_no_more() -> None:
    from ray.llm._internal.common.callbacks.base import CallbackBase

    assert _ray.CallbackBase is CallbackBase
    with pytest.raises(
        AttributeError,
        match=r"^module 'rayserve_hooks.cluster._ray' has no attribute 'CallbackBas'$",
    ):
        _ = _ray.CallbackBas


def test_the_download_modes_are_rays() -> None:
    from ray.llm._internal.common.utils import download_utils

    assert {mode.name for mode in download_utils.NodeModelDownloadable} == {
        mode.name for mode in NodeModelDownloadable
    }
    assert "runai_streamer" in download_utils.STREAMING_LOAD_FORMATS


def test_the_engine_config_has_the_parts_that_are_set() -> None:
    from ray.llm._internal.serve.engines.vllm.vllm_models import VLLMEngineConfig
    from ray.serve.llm import LLMConfig

    config = LLMConfig(model_loading_config={"model_id": "m"})
    engine = config.get_engine_config()
    assert isinstance(engine, VLLMEngineConfig)
    _ray.set_model_path(config, "/models/m")
    assert engine.actual_hf_model_id == "/models/m"
    _ray.set_engine_kwargs(config, {"max_model_len": 8, "enable_auto_tool_choice": True})
    assert engine.engine_kwargs == {"max_model_len": 8}
    assert engine.frontend_kwargs == {"enable_auto_tool_choice": True}
    assert config.engine_kwargs["max_model_len"] == 8
    with pytest.raises(ValueError, match="Unknown engine argument: max_modle_len"):
        _ray.set_engine_kwargs(config, {"max_modle_len": 8})


def test_the_mirror_of_a_config() -> None:
    from ray.serve.llm import LLMConfig

    config = LLMConfig(
        model_loading_config={
            "model_id": "m",
            "model_source": {
                "bucket_uri": "s3://bucket/m",
                "extra_files": [{"bucket_uri": "s3://bucket/x", "destination_path": "~/x"}],
            },
        }
    )
    model_id, mirror = _ray.model_source(config)
    assert model_id == "m"
    assert mirror is not None
    assert (mirror.bucket_uri, mirror.extra_files) == (
        "s3://bucket/m",
        (("s3://bucket/x", "~/x"),),
    )


@pytest.mark.parametrize("uri", ["s3://bucket/m", "gs://bucket/m", "azure://c@a/m"])
def test_a_uri_as_model_source_is_a_mirror(uri: str) -> None:
    """Before Ray 2.57 its engine config has the URI as the model's id, and no mirror."""
    from ray.serve.llm import LLMConfig

    config = LLMConfig(model_loading_config={"model_id": "m", "model_source": uri})
    model_id, mirror = _ray.model_source(config)
    assert model_id == "m"
    assert mirror is not None
    assert (mirror.bucket_uri, mirror.extra_files) == (uri, ())


@pytest.mark.parametrize("source", ["org/model", "/models/m", None])
def test_another_model_source_is_no_mirror(source: str | None) -> None:
    from ray.serve.llm import LLMConfig

    config = LLMConfig(model_loading_config={"model_id": "m", "model_source": source})
    assert _ray.model_source(config) == (source or "m", None)


def test_a_path_that_a_callback_has_set_counts_more_than_a_uri() -> None:
    from ray.serve.llm import LLMConfig

    config = LLMConfig(model_loading_config={"model_id": "m", "model_source": "s3://bucket/m"})
    _ray.set_model_path(config, "/models/m")
    assert _ray.model_source(config)[0] == "/models/m"


@pytest.mark.parametrize("source", ["s3://bucket/m", {"bucket_uri": "s3://bucket/m"}])
@pytest.mark.parametrize(
    ("load_format", "path", "loads"),
    [
        ("runai_streamer", None, "s3://bucket/m"),
        ("runai_streamer", "/models/m", "/models/m"),
        (None, "/models/m", "/models/m"),
    ],
)
def test_an_engine_that_streams_reads_the_mirror(
    source: Any, load_format: str | None, path: str | None, loads: str
) -> None:
    """Ray itself does since 2.59; before, the engine got the model's id."""
    from ray.serve.llm import LLMConfig

    config = LLMConfig(
        model_loading_config={"model_id": "m", "model_source": source},
        engine_kwargs={"load_format": load_format} if load_format else {},
    )
    if path:
        _ray.set_model_path(config, path)
    _ray.stream_from_mirror(config)
    engine: Any = config.get_engine_config()
    assert engine.actual_hf_model_id == loads


def test_an_engine_that_streams_from_nowhere_keeps_its_model() -> None:
    from ray.serve.llm import LLMConfig

    config = LLMConfig(
        model_loading_config={"model_id": "m", "model_source": "org/model"},
        engine_kwargs={"load_format": "runai_streamer"},
    )
    _ray.stream_from_mirror(config)
    assert _ray.model_source(config)[0] == "org/model"


def test_streaming_formats_download_nothing() -> None:
    from ray.serve.llm import LLMConfig

    plain = LLMConfig(model_loading_config={"model_id": "m"})
    streaming = LLMConfig(
        model_loading_config={"model_id": "m"}, engine_kwargs={"load_format": "runai_streamer"}
    )
    assert _ray.default_download_mode(plain) is NodeModelDownloadable.MODEL_AND_TOKENIZER
    assert _ray.default_download_mode(streaming) is NodeModelDownloadable.NONE


@pytest.mark.parametrize(
    ("own", "nodes"),
    [
        (None, ["head", "other"]),
        ("0", ["head"]),
        ("1", ["other"]),
        ("1,0", ["head", "other"]),
        ("7", ["head", "other"]),  # of no bundle of this group
    ],
)
def test_the_nodes_of_a_group_that_replicas_share_are_those_of_the_own_bundles(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch, own: str | None, nodes: list[str]
) -> None:
    from ray.util.placement_group import placement_group

    if own is None:
        monkeypatch.delenv("VLLM_RAY_BUNDLE_INDICES", raising=False)
    else:
        monkeypatch.setenv("VLLM_RAY_BUNDLE_INDICES", own)
    group = placement_group([{"CPU": 1}, {"other": 1}])
    assert group.wait(30)
    ids = {"head": ray_cluster.head_id, "other": ray_cluster.other_id}
    assert [node.id for node in _ray.nodes_of(group)] == [ids[name] for name in nodes]


def test_the_live_nodes_and_all_they_have(ray_cluster: Any) -> None:
    nodes = {node.id: resources for node, resources in _ray.live_nodes()}
    assert nodes[ray_cluster.head_id]["CPU"] == 8
    assert nodes[ray_cluster.other_id]["other"] == 4
    assert [node.id for node, _ in _ray.live_nodes() if node.is_local] == [ray_cluster.head_id]


def test_the_own_node_comes_first(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    found = ray.nodes()
    for order in (found, found[::-1]):
        monkeypatch.setattr("ray.nodes", lambda order=order: order)
        ids = [node.id for node, _ in _ray.live_nodes()]
        assert ids == [ray_cluster.head_id, ray_cluster.other_id]


def test_a_cluster_without_an_autoscaler_has_none(ray_cluster: Any) -> None:
    # Ray's monitor reports some seconds after the start.
    until(lambda: _ray.autoscaler_runs() is not None)
    assert _ray.autoscaler_runs() is False


@pytest.mark.parametrize(
    ("active", "launches", "runs"),
    [
        ({"node_0123abcd": 1}, {}, False),
        ({"node_0123abcd": 1, "gpu-workers": 2}, {}, True),
        ({"node_0123abcd": 1}, {"gpu-workers": 1}, True),
        ({"head": 1}, {}, True),
    ],
)
def test_an_autoscaler_is_known_by_the_types_of_its_nodes(
    monkeypatch: pytest.MonkeyPatch, active: dict[str, int], launches: dict[str, int], runs: bool
) -> None:
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS

    monkeypatch.setattr("ray.autoscaler.v2.utils.is_autoscaler_v2", lambda: False)
    report = {"autoscaler_report": {"active_nodes": active, "pending_launches": launches}}
    kv = {DEBUG_AUTOSCALING_STATUS: json.dumps(report)}
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", kv.get)
    assert _ray.autoscaler_runs() is runs
    kv.clear()
    assert _ray.autoscaler_runs() is None


@pytest.mark.parametrize(
    ("node_type", "launching", "runs"),
    [("node_0123abcd", False, False), ("gpu-workers", False, True), ("node_0123abcd", True, True)],
)
def test_the_second_autoscaler_is_known_by_the_types_of_its_nodes(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch, node_type: str, launching: bool, runs: bool
) -> None:
    from ray.autoscaler.v2 import schema, sdk

    status = sdk.get_cluster_status(ray_cluster.address)
    nodes = [*status.active_nodes, *status.idle_nodes]
    assert nodes, "the fields that are read exist"
    for node in nodes:
        node.ray_node_type_name = node_type
    if launching:
        status.pending_launches.append(
            schema.LaunchRequest("", "gpu-workers", 1, schema.LaunchRequest.Status.PENDING, 0)
        )
    monkeypatch.setattr("ray.autoscaler.v2.utils.is_autoscaler_v2", lambda: True)
    monkeypatch.setattr("ray.autoscaler.v2.sdk.get_cluster_status", lambda _: status)
    assert _ray.autoscaler_runs() is runs
