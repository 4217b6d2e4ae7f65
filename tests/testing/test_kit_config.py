"""The stand-ins for an ``LLMConfig`` and for vLLM's client."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path
from typing import Any

import pytest

from rayserve_hooks.context import CallbackCtx, NodeModelDownloadable
from rayserve_hooks.testing import Engine, Fail, LoraConfig, ModelConfig, RunStack
from rayserve_hooks.testing.config import STREAMING_LOAD_FORMATS, ModelConfigs


def test_what_callbacks_read_of_a_config() -> None:
    config = ModelConfig("m", model_source="s3://bucket/m", engine_kwargs={"max_model_len": 8})
    config.lora_config = LoraConfig("s3://bucket/loras")
    assert config.lora_config.dynamic_lora_loading_path == "s3://bucket/loras"
    assert config.model_loading_config.model_id == "m"
    assert config.model_loading_config.model_source == "s3://bucket/m"
    config.update_engine_kwargs(dtype="auto")
    assert config.get_engine_config().engine_kwargs == {"max_model_len": 8, "dtype": "auto"}
    assert config.get_engine_config().actual_hf_model_id == "m"
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("name", ["model_idd", "log_engine_metrics"])
def test_what_it_has_not_is_an_error_that_says_what_to_give(name: str) -> None:
    with pytest.raises(AttributeError, match=f"no {name!r}.*a real LLMConfig as its config"):
        getattr(ModelConfig(), name)
    with pytest.raises(AttributeError, match="no 'abort'; give run_stack"):
        Engine().abort  # type: ignore[attr-defined] # noqa: B018


def test_a_model_of_the_hub_is_left_to_the_engine(run_stack: RunStack) -> None:
    outcome = run_stack(config=ModelConfig(model_source="org/model")).assert_succeeded()
    assert outcome.model_path == "org/model"
    assert outcome.nodes["node-1"].model_path is None


@pytest.mark.parametrize("load_format", STREAMING_LOAD_FORMATS)
def test_an_engine_that_streams_gets_the_uri(run_stack: RunStack, load_format: str) -> None:
    config = ModelConfig(model_source="s3://bucket/m", engine_kwargs={"load_format": load_format})
    assert ModelConfigs.default_download_mode(config) is NodeModelDownloadable.NONE
    assert run_stack(config=config).assert_succeeded().model_path == "s3://bucket/m"


@pytest.mark.slow
def test_the_formats_that_stream_are_rays() -> None:
    from ray.llm._internal.common.utils.download_utils import STREAMING_LOAD_FORMATS as RAYS

    assert tuple(RAYS) == STREAMING_LOAD_FORMATS


def test_the_replicas_copy_is_another_one(run_stack: RunStack) -> None:
    class Sets:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            ctx.extra_init_kwargs["max_model_len"] = 8

    config = ModelConfig()
    assert run_stack([Sets], config).engine_kwargs == {"max_model_len": 8}
    assert config.engine_kwargs == {}


def test_a_config_that_does_not_travel_fails(run_stack: RunStack) -> None:
    config = ModelConfig(engine_kwargs={"stream": (number for number in range(3))})
    outcome = run_stack([Fail("on_shutdown")], config)
    assert isinstance(outcome.error, TypeError)
    with pytest.raises(pytest.fail.Exception, match="ended with a TypeError, which is no HookErr"):
        outcome.assert_failed()


def test_the_engine_answers() -> None:
    async def ask(engine: Any) -> list[str]:
        await engine.check_health()
        return [output.outputs[0].text async for output in engine.generate("hi", None, "1")]

    engine = Engine("hello")
    assert asyncio.run(ask(engine)) == ["hello"]
    assert engine.prompts == ["hi"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")  # which has no GPU for the config's default bundle
def test_a_real_config_goes_the_same_way(run_stack: RunStack, tmp_path: Path) -> None:
    from rayserve_hooks import LLMConfig

    class Sets:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            ctx.extra_init_kwargs["max_model_len"] = 8

        def on_before_download(self, ctx: CallbackCtx) -> str:
            config: Any = ctx.llm_config
            assert config.get_engine_config().actual_hf_model_id == "tiny"
            return str(tmp_path)

    config = LLMConfig(model_id="tiny", callbacks=[Sets])
    outcome = run_stack(config=config, nodes=2).assert_succeeded()
    assert outcome.engine_kwargs["max_model_len"] == 8
    assert outcome.model_path == str(tmp_path)
