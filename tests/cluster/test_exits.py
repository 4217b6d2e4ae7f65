"""Callbacks that exit, or misuse their thread or loop, on a real cluster of two nodes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import rayserve_hooks
from rayserve_hooks import CallbackCtx, HookError

if TYPE_CHECKING:
    from rayserve_hooks import LLMConfig

pytestmark = pytest.mark.ray

EXITS = "failing_callbacks:Exits"
AT_ONCE_S = 30  # a hang would last for ever


@pytest.fixture(autouse=True)
def _cluster(ray_cluster: Any) -> None:
    pass


def config(*callbacks: Any, spread: bool = True, **fields: Any) -> LLMConfig:
    fields.setdefault("placement_group_config", {"bundles": [{"CPU": 1}]})
    over = [{"callback": "lifecycle_callbacks:SpreadOverNodes"}] if spread else []
    return rayserve_hooks.LLMConfig(model_id="tiny", callbacks=[*over, *callbacks], **fields)


def exits(place: str, error: str = "SystemExit", **kwargs: Any) -> dict[str, Any]:
    kwargs = {"place": place, "error": error, **kwargs}
    return {"callback": EXITS, "kwargs": kwargs, "on_error": "warn"}


def initialize(llm_config: LLMConfig) -> CallbackCtx:
    started = time.monotonic()
    try:
        return asyncio.run(rayserve_hooks.initialize_node(llm_config))
    finally:
        assert time.monotonic() - started < AT_ONCE_S


@pytest.mark.parametrize(
    ("place", "error", "is_async"),
    [
        ("on_before_download", "SystemExit", False),
        ("on_before_download", "SystemExit", True),
        ("on_before_download", "KeyboardInterrupt", False),
        ("on_before_download", "CancelledError", True),
        ("on_before_download", "PanicException", True),
        ("background", "SystemExit", False),
        ("background", "KeyboardInterrupt", True),
    ],
)
def test_an_exit_on_another_node_ends_the_initialization_with_its_name(
    ray_cluster: Any, tmp_path: Path, place: str, error: str, is_async: bool
) -> None:
    record = {"callback": "failing_callbacks:Record", "kwargs": {"path": str(tmp_path / "log")}}
    with pytest.raises(
        HookError,
        match=rf"^callback 'Exits' failed in hook on_before_download on node "
        rf"{ray_cluster.other_id} \(.*\) \(phase: before download\): .*{error}: out",
    ) as caught:
        initialize(config(record, exits(place, error, on_other=True, is_async=is_async)))
    assert type(caught.value.__cause__).__name__ == error
    assert caught.value.cleanup_errors == []
    assert (tmp_path / "log").read_text().count("on_init_failed") == 2


def test_an_exit_of_a_constructor_on_another_node_names_its_callback(ray_cluster: Any) -> None:
    with pytest.raises(
        HookError,
        match=rf"on node {ray_cluster.other_id} .*callback 'Exits': exits where it is built: "
        "SystemExit: out; raise an Exception there instead",
    ):
        initialize(config(exits("constructor")))


def test_an_exit_in_the_clean_up_of_another_node_is_collected(ray_cluster: Any) -> None:
    fails = {"callback": "lifecycle_callbacks:Fail", "kwargs": {"hook": "on_after_init"}}
    with pytest.raises(HookError, match="no such bucket") as caught:
        initialize(config(exits("on_init_failed", "KeyboardInterrupt"), fails))
    assert [(error.callback, error.node.split()[0]) for error in caught.value.cleanup_errors] == [
        ("Exits", ray_cluster.other_id),
        ("Exits", ray_cluster.head_id),
    ]


def test_an_exit_in_a_serve_replica_ends_the_initialization_with_its_name() -> None:
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Replica:
        async def initialize(self, llm_config: LLMConfig) -> str:
            try:
                await rayserve_hooks.initialize_node(llm_config)
            except HookError as error:
                return str(error)
            return ""

    deployment: Any = Replica
    handle: Any = serve.run(deployment.bind(), name="exits", route_prefix="/exits")
    try:
        for place in ("on_before_init", "background", "on_after_init"):
            for is_async in (False, True):
                llm_config = config(exits(place, is_async=is_async), spread=False)
                text = handle.initialize.remote(llm_config).result(timeout_s=AT_ONCE_S)
                assert text.startswith("callback 'Exits' failed in hook on_"), text
                assert "SystemExit: out" in text
    finally:
        serve.delete("exits")


@pytest.mark.parametrize("what", ["block", "stop_and_block"])
def test_a_limit_counts_whatever_a_callback_does_to_its_loop(ray_cluster: Any, what: str) -> None:
    blocks = {
        "callback": "failing_callbacks:BlocksItsLoop",
        "kwargs": {"node": ray_cluster.other_id, "stops": what == "stop_and_block"},
    }
    with pytest.raises(
        HookError,
        match=rf"^callback 'BlocksItsLoop' failed in hook on_before_download on node "
        rf"{ray_cluster.other_id} .*: not done after 1 s, the time limit 'on_before_download'",
    ) as caught:
        initialize(config(blocks, time_limits={"on_before_download": 1}))
    assert caught.value.cleanup_errors == []
