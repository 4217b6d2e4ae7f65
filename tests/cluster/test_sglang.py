"""Callbacks in front of SGLang's engine, for which there is a stand-in in tests/stand_ins."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayserve_hooks.cluster import _ray
from rayserve_hooks.errors import HookError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

STAND_INS = Path(__file__).parent.parent / "stand_ins"
RAYS_OWN = "ray.llm._internal.serve.engines.sglang:SGLangServer"


def config_of(*callbacks: Any, source: str | None = "org/model", **fields: Any) -> Any:
    from rayserve_hooks import LLMConfig

    return LLMConfig(
        model_loading_config={"model_id": "tiny", "model_source": source},
        server_cls="rayserve_hooks.SGLangServer",
        callbacks=list(callbacks),
        placement_group_config={"placement_group_bundles": [{"CPU": 1}]},
        log_engine_metrics=False,
        **fields,
    )


@pytest.fixture
def engine(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that starts a server here, and returns what its engine was given."""
    monkeypatch.syspath_prepend(str(STAND_INS))

    def started(config: Any) -> dict[str, Any]:
        from rayserve_hooks import SGLangServer

        server: Any = SGLangServer.__new__(SGLangServer)
        asyncio.run(server.__init__(config))
        arguments: dict[str, Any] = server.engine.arguments
        return arguments

    return started


def bring(path: object) -> dict[str, Any]:
    return {"callback": "lifecycle_callbacks:BringModel", "kwargs": {"path": str(path)}}


def test_the_engine_gets_what_callbacks_have_brought_and_set(engine: Any, tmp_path: Path) -> None:
    setting = {"hook": "on_after_init", "values": {"extra_init_kwargs": {"mem_fraction": 0.5}}}
    sets = {"callback": "lifecycle_callbacks:Set", "kwargs": setting}
    arguments = engine(config_of(bring(tmp_path), sets, engine_kwargs={"tp_size": 1}))
    assert arguments == {"tp_size": 1, "model_path": str(tmp_path), "mem_fraction": 0.5}


@pytest.mark.parametrize(
    ("source", "kwargs", "loads"),
    [
        ("org/model", {}, "org/model"),
        (None, {}, "tiny"),
        ("org/model", {"model_path": "/models/m"}, "/models/m"),
        ("s3://bucket/m", {"load_format": "runai_streamer"}, "s3://bucket/m"),
        ({"bucket_uri": "s3://bucket/m"}, {"load_format": "runai_streamer"}, "s3://bucket/m"),
    ],
)
def test_without_a_download_it_loads_what_the_config_names(
    engine: Any, source: Any, kwargs: dict[str, Any], loads: str
) -> None:
    found = engine(config_of("lifecycle_callbacks:Plain", source=source, engine_kwargs=kwargs))
    assert found == {**kwargs, "model_path": loads}


def test_a_config_of_rays_with_a_callback_of_rays_kind(engine: Any) -> None:
    from ray.serve.llm import LLMConfig

    config = LLMConfig(
        model_loading_config={"model_id": "tiny"},
        server_cls="rayserve_hooks.SGLangServer",
        callback_config={  # type: ignore[arg-type] # pydantic makes it one
            "callback_class": "ray_callbacks:Everything",
            "callback_kwargs": {"greeting": "hello"},
        },
        log_engine_metrics=False,
        placement_group_config={"placement_group_bundles": [{"CPU": 1}]},
    )
    assert engine(config)["model_path"] == "tiny"


def test_a_failing_callback_keeps_the_engine_from_starting(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.ray.engine import RayEngine

    started: list[object] = []
    monkeypatch.setattr(RayEngine, "__init__", lambda _, **kwargs: started.append(kwargs))
    fail = {"callback": "lifecycle_callbacks:Fail", "kwargs": {"hook": "on_after_init"}}
    with pytest.raises(HookError, match="callback 'Fail' failed in hook on_after_init"):
        engine(config_of(fail))
    assert started == []


def test_a_group_of_a_callbacks_own_is_not_the_engines(
    engine: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.util.placement_group import placement_group

    reserved = placement_group([{"CPU": 1}])
    monkeypatch.setattr(_ray, "current_placement_group", lambda: reserved)
    assert engine(config_of("lifecycle_callbacks:SpreadOverNodes"))
    assert "SGLang starts its engine in the one that Ray Serve made" in caplog.text


def test_rays_own_server_is_refused_where_there_are_callbacks() -> None:
    from rayserve_hooks import LLMConfig

    fields: dict[str, Any] = {"model_id": "tiny", "server_cls": RAYS_OWN}
    with pytest.raises(ValueError, match=r"runs no callbacks; name 'rayserve_hooks\.SGLangServer'"):
        LLMConfig(callbacks=["startup_metrics"], **fields)
    LLMConfig(**fields)


@pytest.fixture
def _nothing_deployed_after(ray_cluster: Any) -> Iterator[None]:
    yield
    from ray import serve

    serve.delete("sglang")


@pytest.mark.usefixtures("_nothing_deployed_after")
def test_served(ray_cluster: Any, tmp_path: Path) -> None:
    from ray import serve
    from ray.serve.llm import build_openai_app
    from test_end_to_end import chat

    trace = {"callback": "trace_writer:TraceWriter", "kwargs": {"path": str(tmp_path / "trace")}}
    path = os.pathsep.join([str(STAND_INS), os.environ["PYTHONPATH"]])
    config = config_of(
        trace,
        "lifecycle_callbacks:Plain",
        bring(tmp_path),
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    serve.run(build_openai_app({"llm_configs": [config]}), name="sglang", route_prefix="/sglang")
    answer = chat(f"http://127.0.0.1:{ray_cluster.http_port}/sglang", "hello")
    arguments = json.loads(answer.json()["choices"][0]["message"]["content"])
    assert arguments["model_path"] == str(tmp_path)
    calls = json.loads((tmp_path / "trace").read_text())
    assert {(call["role"], call["hook"]) for call in calls if call["callback"] == "Plain"} == {
        ("replica", hook) for hook in ("on_before_init", "on_before_download", "on_after_init")
    }
