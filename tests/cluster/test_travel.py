"""What travels to another node and back."""

from __future__ import annotations

import pickle
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from plugins_for_tests import Plain, make_ctx, make_manager, make_stack, sent

from rayserve_hooks.cluster.travel import (
    ModelSource,
    NodeReply,
    context_of,
    load_custom_data,
    pack_custom_data,
    request_for,
)
from rayserve_hooks.context import CallbackCtx, NodeInfo, NodeModelDownloadable, NodeResult
from rayserve_hooks.core.recorder import recorder_of
from rayserve_hooks.errors import HookError
from rayserve_hooks.trace import TraceEntry

pytestmark = pytest.mark.slow  # it asks Ray how to pickle

HERE = "on node n1 (10.0.0.1)"
NODE_2 = NodeInfo("n2", "10.0.0.2", is_local=False)
SOURCE = ModelSource("org/m", None)
CANNOT_TRAVEL = (
    "ctx.custom_data['client'] cannot be sent to another process: TypeError: cannot pickle "
    "'generator' object; store plain data there and keep the object on the callback"
)


class Unpicklable:
    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.custom_data["client"] = (number for number in range(1))


class Assigns:
    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.worker_node_download_model = "TOKENIZER_ONLY"
        ctx.custom_data["seen"] = [1]


def test_a_value_that_cannot_travel_names_its_key_and_who_set_it() -> None:
    ctx = make_ctx()
    make_manager({"callback": Unpicklable, "name": "mine"}).hook.on_before_init(ctx=ctx)
    with pytest.raises(HookError) as caught:
        pack_custom_data(ctx)
    assert str(caught.value) == (
        f"callback 'mine' failed in hook on_before_init {HERE} (phase: before download): "
        f"{CANNOT_TRAVEL}"
    )


def test_a_value_that_nobody_set_cannot_travel_either() -> None:
    ctx = make_ctx(custom_data={"client": (number for number in range(1))})
    with pytest.raises(HookError) as caught:
        pack_custom_data(ctx)
    assert str(caught.value) == (
        f"node initialization failed {HERE} (phase: before download): {CANNOT_TRAVEL}"
    )


def test_custom_data_arrives_as_a_copy() -> None:
    ctx = make_ctx(custom_data={"a": [1]})
    copy = load_custom_data(pack_custom_data(ctx), ctx.node, {})
    assert copy == {"a": [1]}
    assert copy["a"] is not ctx.custom_data["a"]


def test_the_context_of_another_node_is_a_copy_of_the_replicas() -> None:
    group: Any = SimpleNamespace(id="pg", bundle_specs=[{"CPU": 1}])
    ctx = make_ctx(
        placement_group=group,
        runtime_env={"env_vars": {"A": "1"}},
        extra_init_kwargs={"seed": 1},
        local_node_download_model="NONE",
    )
    make_manager(Assigns).hook.on_before_init(ctx=ctx)
    config = pickle.dumps(SimpleNamespace(model_id="m"))
    request = sent(request_for(NODE_2, ctx, make_stack(Plain), SOURCE, config))
    there = context_of(request, attempt=2)
    assert there.node == NODE_2
    assert there.llm_config.model_id == "m"
    assert there.local_node_download_model is NodeModelDownloadable.NONE
    assert there.worker_node_download_model is NodeModelDownloadable.TOKENIZER_ONLY
    assert there.placement_group == group
    assert there.runtime_env == ctx.runtime_env
    assert there.extra_init_kwargs == ctx.extra_init_kwargs
    assert there.custom_data == {"seen": [1]}
    assert list(there.trace) == []
    there.runtime_env["env_vars"]["A"] = "2"
    assert ctx.runtime_env == {"env_vars": {"A": "1"}}


def test_what_callbacks_have_assigned_counts_as_assigned_there() -> None:
    ctx = make_ctx()
    make_manager(Assigns).hook.on_before_init(ctx=ctx)
    there = context_of(request_for(NODE_2, ctx, make_stack(), SOURCE, b""), attempt=1)
    assert recorder_of(there).assigned == {"worker_node_download_model"}
    other = context_of(request_for(NODE_2, make_ctx(), make_stack(), SOURCE, b""), attempt=1)
    assert recorder_of(other).assigned == set()


def test_calls_there_are_recorded_as_the_nodes() -> None:
    told: list[TraceEntry] = []
    request = request_for(NODE_2, make_ctx(), make_stack(), SOURCE, b"")
    there = context_of(request, attempt=2, on_call=told.append)
    make_manager(Plain).hook.on_before_init(ctx=there)
    (entry,) = there.trace
    assert (entry.role, entry.node_id, entry.attempt) == ("node", "n2", 2)
    assert told == [entry]


def test_a_reply_has_the_custom_data_of_its_node() -> None:
    result = NodeResult(NODE_2, "/m", {}, None, 0.1, 0.2)
    reply = NodeReply(result, pack_custom_data(make_ctx(custom_data={"b": 2})), {}, [])
    assert dict(sent(reply).unpacked().custom_data) == {"b": 2}
    assert result.custom_data == {}


class ExitsWhenLoaded:
    def __reduce__(self) -> tuple[object, ...]:
        return sys.exit, ("out",)


class BreaksWhenLoaded:
    def __reduce__(self) -> tuple[object, ...]:
        return int, ("no number",)


@pytest.mark.parametrize(
    ("value", "text"),
    [(ExitsWhenLoaded(), "SystemExit: out"), (BreaksWhenLoaded(), "ValueError: invalid literal")],
)
def test_a_value_that_cannot_be_built_again_names_key_and_callback(
    value: object, text: str
) -> None:
    ctx = make_ctx()

    class Sets:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            ctx.custom_data["client"] = value

    make_manager(Sets).hook.on_before_init(ctx=ctx)
    packed, setters = pack_custom_data(ctx), {"client": ctx.trace[0]}
    with pytest.raises(
        HookError,
        match=r"^callback 'Sets' failed in hook .*ctx.custom_data\['client'\] cannot "
        rf"be built again in another process: {text}.*; store plain data there and keep the object "
        "on the callback$",
    ):
        load_custom_data(packed, ctx.node, setters)  # type: ignore[arg-type]
