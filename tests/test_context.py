import copy
import enum
import inspect
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plugins_for_tests import hook_arguments, make_ctx, make_manager

from rayserve_hooks.context import (
    CallbackCtx,
    DeferredConfig,
    Handled,
    NodeInfo,
    NodeModelDownloadable,
    NodeResult,
    ProcessInfo,
)
from rayserve_hooks.errors import HookError

MODES = ["MODEL_AND_TOKENIZER", "TOKENIZER_ONLY", "EXCLUDE_SAFETENSORS", "NONE"]
MODE_FIELDS = ["local_node_download_model", "worker_node_download_model"]
DICT_FIELDS = ["placement_group_config", "runtime_env", "extra_init_kwargs", "custom_data"]
READ_ONLY = ["engine", "handled", "llm_config", "log", "node", "nodes", "process", "trace"]

OtherEnum = enum.Enum("OtherEnum", ["ALL"])
ForeignMode = enum.Enum("ForeignMode", MODES)  # type: ignore[misc]


@pytest.mark.parametrize("field", MODE_FIELDS)
@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("kind", [str, NodeModelDownloadable.__getitem__, ForeignMode.__getitem__])
def test_a_download_mode_is_accepted_in_each_form(field: str, name: str, kind: Any) -> None:
    ctx = make_ctx(**dict.fromkeys(MODE_FIELDS, "NONE" if name != "NONE" else "TOKENIZER_ONLY"))
    setattr(ctx, field, kind(name))
    assert getattr(ctx, field) is NodeModelDownloadable[name]


@pytest.mark.parametrize("field", MODE_FIELDS)
@pytest.mark.parametrize("wrong", ["ALL", "none", None, True, OtherEnum["ALL"]])
def test_a_wrong_download_mode_lists_the_modes(field: str, wrong: object) -> None:
    ctx = make_ctx()
    text = (
        f"cannot set ctx.{field}: {wrong!r} is not a download mode; "
        "use one of EXCLUDE_SAFETENSORS, MODEL_AND_TOKENIZER, NONE, TOKENIZER_ONLY"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        setattr(ctx, field, wrong)
    assert getattr(ctx, field) is NodeModelDownloadable.MODEL_AND_TOKENIZER


@pytest.mark.parametrize("field", DICT_FIELDS)
def test_a_dict_field_keeps_the_very_dict_assigned(field: str) -> None:
    ctx, value = make_ctx(), {"key": 1}
    setattr(ctx, field, value)
    assert getattr(ctx, field) is value


@pytest.mark.parametrize("field", DICT_FIELDS)
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (None, "NoneType is not a dict; assign a dict with string keys"),
        ([("a", 1)], "list is not a dict; assign a dict with string keys"),
        ({"a": 1, 2: 3}, "key 2 is not a string; use string keys"),
    ],
)
def test_a_dict_field_refuses(field: str, wrong: object, text: str) -> None:
    ctx = make_ctx()
    with pytest.raises(TypeError, match=f"^{re.escape(f'cannot set ctx.{field}: {text}')}$"):
        setattr(ctx, field, wrong)


def test_a_refused_value_is_not_quoted_as_it_may_hold_secrets() -> None:
    with pytest.raises(TypeError) as caught:
        make_ctx(runtime_env=[("TOKEN", "s3cret")])
    assert "s3cret" not in str(caught.value)


def test_a_placement_group_is_known_by_its_attributes() -> None:
    ctx = make_ctx()
    group: Any = SimpleNamespace(id="pg", bundle_specs=[{"CPU": 1}])
    ctx.placement_group = group
    assert ctx.placement_group is group
    ctx.placement_group = None
    assert ctx.placement_group is None


def test_anything_else_is_no_placement_group() -> None:
    ctx = make_ctx()
    text = (
        "cannot set ctx.placement_group: 'pg-1' is not a placement group; "
        "assign what ray.util.placement_group() returns"
    )
    with pytest.raises(TypeError, match=re.escape(text)):
        ctx.placement_group = "pg-1"  # type: ignore[assignment]


def test_initial_values_are_checked_like_assignments() -> None:
    with pytest.raises(ValueError, match=re.escape("cannot set ctx.local_node_download_model: 7")):
        make_ctx(local_node_download_model=7)


@pytest.mark.parametrize("name", ["runtime_envs", "role", "trace"])
def test_an_argument_that_is_no_field_is_a_type_error(name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument {name!r}"):
        make_ctx(**{name: {}})


def test_the_config_is_the_only_argument_that_is_needed() -> None:
    config: Any = object()
    ctx = CallbackCtx(llm_config=config)
    assert ctx.llm_config is config
    assert ctx.local_node_download_model is NodeModelDownloadable.MODEL_AND_TOKENIZER
    assert ctx.worker_node_download_model is NodeModelDownloadable.MODEL_AND_TOKENIZER
    assert ctx.placement_group is None
    assert ctx.runtime_env == ctx.extra_init_kwargs == ctx.custom_data == {}
    assert ctx.node == NodeInfo("local", "127.0.0.1", is_local=True)
    assert dict(ctx.nodes) == {}
    assert ctx.handled is None
    assert list(ctx.trace) == []
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'llm_config'"):
        CallbackCtx()  # type: ignore[call-arg]


def test_two_contexts_share_nothing() -> None:
    first, second = CallbackCtx(llm_config=1), CallbackCtx(llm_config=1)
    first.custom_data["a"] = 1
    first.runtime_env["a"] = 1
    first.extra_init_kwargs["a"] = 1
    assert second.custom_data == second.runtime_env == second.extra_init_kwargs == {}


def test_a_hook_runs_on_a_context_made_for_a_test() -> None:
    class Takes:
        def on_before_init(self, ctx: CallbackCtx) -> Handled:
            ctx.custom_data["seen"] = ctx.llm_config
            return Handled("/m")

    ctx = CallbackCtx(llm_config="stand-in")
    assert Takes().on_before_init(ctx) == Handled("/m")
    assert ctx.custom_data == {"seen": "stand-in"}
    assert make_manager(Takes).hook.on_before_init(ctx=ctx) == Handled("/m")
    assert [(entry.callback, entry.role) for entry in ctx.trace] == [("Takes", "driver")]


def test_every_initial_value_is_the_fields() -> None:
    result = NodeResult(NodeInfo("n2", "10.0.0.2", is_local=False), "/m", {}, None, 0.1, 0.2)
    group: Any = SimpleNamespace(id="pg", bundle_specs=[{"CPU": 1}])
    handled, dicts = Handled("/m"), {name: {name: 1} for name in DICT_FIELDS}
    ctx = make_ctx(
        local_node_download_model="NONE",
        worker_node_download_model="TOKENIZER_ONLY",
        placement_group=group,
        nodes={"n2": result},
        handled=handled,
        **dicts,
    )
    assert ctx.local_node_download_model is NodeModelDownloadable.NONE
    assert ctx.worker_node_download_model is NodeModelDownloadable.TOKENIZER_ONLY
    assert ctx.placement_group is group
    assert ctx.nodes == {"n2": result}
    assert ctx.handled is handled
    assert all(getattr(ctx, name) is value for name, value in dicts.items())


def test_outside_of_a_hook_nothing_can_run_in_the_background() -> None:
    text = r"^ctx.run_in_background\(\) works in hooks only; call it from a hook$"
    ctx = CallbackCtx(llm_config=1)
    with pytest.raises(RuntimeError, match=text):
        ctx.run_in_background(print)
    make_manager().hook.on_before_init(ctx=ctx)
    with pytest.raises(RuntimeError, match=text):
        ctx.run_in_background(print)


@pytest.mark.parametrize("field", READ_ONLY)
def test_a_read_only_field_says_what_may_be_changed(field: str) -> None:
    ctx = make_ctx()
    text = (
        f"ctx.{field} is read-only; change one of local_node_download_model, "
        "worker_node_download_model, placement_group, placement_group_config, runtime_env, "
        "extra_init_kwargs, custom_data"
    )
    with pytest.raises(AttributeError, match=f"^{re.escape(text)}$"):
        setattr(ctx, field, {})


def test_nodes_cannot_be_changed_in_place() -> None:
    nodes: Any = make_ctx().nodes
    with pytest.raises(TypeError, match="does not support item assignment"):
        nodes["n1"] = None


def test_writing_a_misspelt_field_suggests_the_right_one() -> None:
    ctx = make_ctx()
    text = "CallbackCtx has no field 'runtime_envs'; did you mean 'runtime_env'?"
    with pytest.raises(AttributeError, match=f"^{re.escape(text)}$"):
        ctx.runtime_envs = {}  # type: ignore[attr-defined]


def test_reading_a_misspelt_field_suggests_the_right_one() -> None:
    text = "CallbackCtx has no field 'custom_date'; did you mean 'custom_data'?"
    with pytest.raises(AttributeError, match=f"^{re.escape(text)}$"):
        _ = make_ctx().custom_date  # type: ignore[attr-defined]


def test_an_unlike_field_gets_the_list_of_fields() -> None:
    text = "CallbackCtx has no field 'zzz'; use one of local_node_download_model, worker_node"
    with pytest.raises(AttributeError, match=f"^{re.escape(text)}"):
        _ = make_ctx().zzz  # type: ignore[attr-defined]


class MisspeltWrite:
    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.runtime_envs = {}  # type: ignore[attr-defined]


class MisspeltRead:
    def on_before_init(self, ctx: CallbackCtx) -> None:
        _ = ctx.runtime_envs  # type: ignore[attr-defined]


class WrongValue:
    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.local_node_download_model = "ALL"  # type: ignore[assignment]


class ReadOnlyWrite:
    def on_before_init(self, ctx: CallbackCtx) -> None:
        ctx.node = NodeInfo("n2", "10.0.0.2", is_local=False)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (MisspeltWrite, "CallbackCtx has no field 'runtime_envs'; did you mean 'runtime_env'?"),
        (MisspeltRead, "CallbackCtx has no field 'runtime_envs'; did you mean 'runtime_env'?"),
        (WrongValue, "cannot set ctx.local_node_download_model: 'ALL' is not a download mode"),
        (ReadOnlyWrite, "ctx.node is read-only; change one of "),
    ],
)
def test_inside_a_callback_the_error_names_it(cls: type, text: str) -> None:
    manager, ctx = make_manager({"callback": cls, "name": "mine"}), make_ctx()
    with pytest.raises(HookError) as caught:
        manager.hook.on_before_init(ctx=ctx)
    assert str(caught.value.__cause__).startswith(f"callback 'mine': {text}")


def test_after_a_callback_the_error_names_it_no_longer() -> None:
    class Good:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            pass

    ctx = make_ctx()
    make_manager(Good).hook.on_before_init(ctx=ctx)
    with pytest.raises(AttributeError, match=r"^CallbackCtx has no field 'zzz'"):
        _ = ctx.zzz  # type: ignore[attr-defined]


def test_repr_shows_keys_but_no_values_of_dicts() -> None:
    ctx = make_ctx(
        runtime_env={"env_vars": {"TOKEN": "s3cret"}},
        extra_init_kwargs={"api_key": "s3cret"},
        custom_data={"password": "s3cret"},
    )
    assert repr(ctx) == (
        "CallbackCtx(node=n1 (10.0.0.1), "
        "local_node_download_model=NodeModelDownloadable.MODEL_AND_TOKENIZER, "
        "worker_node_download_model=NodeModelDownloadable.MODEL_AND_TOKENIZER, "
        "placement_group=None, placement_group_config=[], runtime_env=['env_vars'], "
        "extra_init_kwargs=['api_key'], custom_data=['password'], nodes=[])"
    )


def test_repr_copes_with_keys_that_were_put_in_place() -> None:
    data: Any = {"a": 1}
    ctx = make_ctx(custom_data=data)
    data[2] = "two"
    assert "custom_data=" in repr(ctx)


def test_repr_of_a_node_result_hides_custom_data() -> None:
    node = NodeInfo("n1", "10.0.0.1", is_local=True)
    assert "s3cret" not in repr(NodeResult(node, "/m", {"token": "s3cret"}, None, 0.1, 0.2))


def test_llm_config_is_loaded_at_its_first_use_and_once() -> None:
    loads: list[object] = []

    def load() -> Any:
        loads.append(object())
        return loads[-1]

    ctx = CallbackCtx(llm_config=DeferredConfig(load))
    assert not loads
    assert ctx.llm_config is ctx.llm_config is loads[0]
    assert len(loads) == 1


def test_a_config_that_can_be_called_is_not_taken_for_its_loader() -> None:
    config: Any = lambda: "loaded"
    assert CallbackCtx(llm_config=config).llm_config is config


def test_the_fields_are_those_that_are_documented() -> None:
    doc = inspect.getdoc(CallbackCtx)
    assert doc
    attributes = doc.partition("Attributes:\n")[2].partition("\n\n")[0]
    documented = re.findall(r"^    (\w+):", attributes, re.MULTILINE)
    fields = [
        name
        for name, value in vars(CallbackCtx).items()
        if not name.startswith("_") and not inspect.isroutine(value)
    ]
    assert sorted(documented) == sorted(fields)


def test_every_read_write_field_is_an_argument() -> None:
    arguments = set(inspect.signature(CallbackCtx).parameters)
    assert arguments == {
        *MODE_FIELDS,
        *DICT_FIELDS,
        "engine",
        "handled",
        "llm_config",
        "node",
        "nodes",
        "placement_group",
        "process",
    }


def test_handled_takes_a_path_as_a_string() -> None:
    assert Handled("/models/a").model_path == "/models/a"
    assert Handled().model_path is None


def test_handled_turns_a_path_object_into_a_string() -> None:
    assert Handled(Path("/models/a"), reason="cached") == Handled("/models/a", "cached")
    assert type(Handled(Path("/models/a")).model_path) is str


@pytest.mark.parametrize("wrong", [True, False, 3, b"/models/a", ["/models/a"]])
def test_handled_refuses_what_is_no_path(wrong: Any) -> None:
    text = f"Handled(model_path=...) takes a path or None, got {wrong!r}"
    with pytest.raises(TypeError, match=re.escape(text)):
        Handled(wrong)


def test_handled_refuses_a_path_object_of_bytes() -> None:
    class BytesPath(os.PathLike[bytes]):
        def __fspath__(self) -> bytes:
            return b"/models/a"

    with pytest.raises(TypeError, match=re.escape("takes a path or None, got b'/models/a'")):
        Handled(BytesPath())  # type: ignore[arg-type]


def test_handled_refuses_an_empty_path() -> None:
    text = "Handled(model_path='') names no folder; give a path or None"
    with pytest.raises(ValueError, match=re.escape(text)):
        Handled("")


def test_handled_refuses_a_reason_that_is_no_string() -> None:
    with pytest.raises(TypeError, match=re.escape("Handled(reason=...) takes a string, got None")):
        Handled(reason=None)  # type: ignore[arg-type]


def test_handled_is_frozen() -> None:
    with pytest.raises(AttributeError, match="cannot assign to field 'model_path'"):
        Handled("/a").model_path = "/b"  # type: ignore[misc]


GROUP = {"bundles": [{"GPU": 1}], "strategy": "PACK"}
TOO_LATE = (
    "ctx.placement_group_config counts in on_configure only, before Serve reserves anything; set "
    "it there, or set placement_group_config of the LLMConfig"
)


def run_in(hook: str, change: Callable[[CallbackCtx], object]) -> CallbackCtx:
    """Call a callback named 'mine' in a hook, which changes a context with a group's config."""
    ctx = make_ctx(placement_group_config={"bundles": [{"GPU": 1}], "strategy": "PACK"})

    class Changes:
        pass

    setattr(Changes, hook, lambda self, ctx: change(ctx))
    manager = make_manager({"callback": Changes(), "name": "mine"})
    getattr(manager.hook, hook)(**hook_arguments(hook, ctx))
    return ctx


def assigns(ctx: CallbackCtx) -> None:
    ctx.placement_group_config = {"bundles": [{"GPU": 2}]}


def adds_a_bundle(ctx: CallbackCtx) -> None:
    ctx.placement_group_config["bundles"].append({"GPU": 1})


def changes_a_bundle(ctx: CallbackCtx) -> None:
    ctx.placement_group_config["bundles"][0]["GPU"] = 2


def updates(ctx: CallbackCtx) -> None:
    ctx.placement_group_config.update(strategy="SPREAD")


@pytest.mark.parametrize("change", [assigns, adds_a_bundle, changes_a_bundle, updates])
def test_the_groups_config_counts_in_on_configure(change: Callable[[CallbackCtx], object]) -> None:
    ctx = run_in("on_configure", lambda ctx: change(ctx) and None)
    assert ctx.placement_group_config != GROUP


@pytest.mark.parametrize("change", [assigns, adds_a_bundle, changes_a_bundle, updates])
@pytest.mark.parametrize("hook", ["on_before_init", "on_before_engine_init", "on_engine_ready"])
def test_later_the_groups_config_says_where_to_set_it(
    hook: str, change: Callable[[CallbackCtx], object]
) -> None:
    with pytest.raises(HookError) as caught:
        run_in(hook, change)
    assert str(caught.value.__cause__) == f"callback 'mine': {TOO_LATE}"


def test_later_the_groups_config_can_be_read_and_copied() -> None:
    read: list[Any] = []
    run_in("on_before_init", lambda ctx: read.append(ctx.placement_group_config))
    assert read == [GROUP]
    for copied in (copy.deepcopy(read[0]), pickle.loads(pickle.dumps(read[0]))):
        assert type(copied) is dict
        assert type(copied["bundles"]) is list
        copied["bundles"].append({})


def test_before_the_engine_is_up_there_is_none() -> None:
    text = r"^ctx.engine is there once the engine is up; use it in on_engine_ready$"
    with pytest.raises(RuntimeError, match=text):
        _ = make_ctx().engine
    with pytest.raises(HookError, match=r"callback 'mine': ctx\.engine is there once"):
        run_in("on_after_init", lambda ctx: ctx.engine)
    engine: Any = object()
    assert make_ctx(engine=engine).engine is engine


def test_a_process_says_its_role_and_rank() -> None:
    assert str(make_ctx().process) == "driver"
    assert make_ctx().process.pid == os.getpid()
    assert str(ProcessInfo("worker", 0)) == "worker 0"
