"""Who is running, what each call changed, and which callbacks disagree."""

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from plugins_for_tests import hook_log, make_ctx, make_manager
from steps import Wrapping, call, outcomes, step, wraps

from rayserve_hooks.context import CallbackCtx, Handled, NodeInfo, NodeResult, ProcessInfo
from rayserve_hooks.core.recorder import Recorder, changes_between, recorder_of, snapshot
from rayserve_hooks.trace import ABSENT, TraceEntry

Changing = Callable[[CallbackCtx], object]


def changing(name: str, change: Changing) -> dict[str, object]:
    class Changes:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            change(ctx)

    return {"callback": Changes, "name": name}


def run(ctx: CallbackCtx, *changes: Changing) -> CallbackCtx:
    """Run one callback per change, named A, B, C..."""
    steps = [changing(name, change) for name, change in zip("ABCDE", changes, strict=False)]
    make_manager(*steps).hook.on_before_init(ctx=ctx)
    return ctx


DEFAULT = "MODEL_AND_TOKENIZER"


class Uncomparable:
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no truth value")

    __hash__ = None  # type: ignore[assignment]


def test_an_entry_says_who_ran_where_and_how_it_ended() -> None:
    ctx = make_ctx(process=ProcessInfo("worker", 3))
    run(ctx, lambda ctx: None)
    (entry,) = ctx.trace
    assert (entry.callback, entry.hook) == ("A", "on_before_init")
    assert (entry.role, entry.rank, entry.process) == ("worker", 3, "worker 3")
    assert (entry.node_id, entry.pid) == ("n1", os.getpid())
    assert entry.outcome == "returned"


def test_an_entry_is_timed() -> None:
    (entry,) = run(make_ctx(), lambda ctx: None).trace
    assert entry.start > 0
    assert entry.duration_s is not None
    assert entry.duration_s >= 0


def test_an_entry_of_a_running_callback_has_no_duration() -> None:
    seen: list[tuple[str, float | None]] = []
    run(make_ctx(), lambda ctx: seen.append((ctx.trace[0].outcome, ctx.trace[0].duration_s)))
    assert seen == [("running", None)]


def test_a_first_result_is_handled_and_the_rest_is_skipped() -> None:
    class Takes:
        def on_before_init(self, ctx: CallbackCtx) -> Handled:
            return Handled("/m")

    class Never(Takes):
        pass

    ctx = make_ctx()
    make_manager(Takes, Never).hook.on_before_init(ctx=ctx)
    assert outcomes(ctx) == [("Takes", "handled"), ("Never", "skipped")]
    assert (ctx.trace[1].reason, ctx.trace[1].duration_s) == ("'Takes' took over", 0.0)


def set_nested(ctx: CallbackCtx) -> None:
    ctx.runtime_env["env_vars"]["A"] = "2"


def delete_nested(ctx: CallbackCtx) -> None:
    del ctx.runtime_env["env_vars"]["A"]


def assign_mode(ctx: CallbackCtx) -> None:
    ctx.local_node_download_model = "NONE"


def assign_dict(ctx: CallbackCtx) -> None:
    ctx.extra_init_kwargs = {"max_model_len": 1}


def change_list(ctx: CallbackCtx) -> None:
    ctx.custom_data["list"].append(1)


def change_dict_in_list(ctx: CallbackCtx) -> None:
    ctx.custom_data["list"][0]["a"] = 2


def dict_becomes_text(ctx: CallbackCtx) -> None:
    ctx.runtime_env["env_vars"] = "none"


def drop_field_content(ctx: CallbackCtx) -> None:
    ctx.runtime_env = {}


@pytest.mark.parametrize(
    ("change", "paths"),
    [
        (set_nested, ("runtime_env.env_vars.A",)),
        (delete_nested, ("runtime_env.env_vars.A",)),
        (assign_mode, ("local_node_download_model",)),
        (assign_dict, ("extra_init_kwargs.max_model_len",)),
        (change_list, ("custom_data.list",)),
        (change_dict_in_list, ("custom_data.list",)),
        (dict_becomes_text, ("runtime_env.env_vars",)),
        (drop_field_content, ("runtime_env.env_vars.A",)),
    ],
)
def test_changes_are_dotted_paths(change: Changing, paths: tuple[str, ...]) -> None:
    ctx = make_ctx(runtime_env={"env_vars": {"A": "1"}}, custom_data={"list": [{"a": 1}]})
    assert run(ctx, change).trace[0].changed == paths


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        (assign_mode, *(f"<NodeModelDownloadable.{n}: '{n}'>" for n in (DEFAULT, "NONE"))),
        (assign_dict, ABSENT, "1"),
        (change_list, "[{'a': 1}]", "[{'a': 1}, 1]"),
        (set_nested, "***", "***"),
        (delete_nested, "***", ABSENT),
    ],
)
def test_a_change_tells_the_values_before_and_after(
    change: Changing, before: str, after: str
) -> None:
    ctx = make_ctx(runtime_env={"env_vars": {"A": "1"}}, custom_data={"list": [{"a": 1}]})
    (found,) = run(ctx, change).trace[0].changes
    assert (found.before, found.after) == (before, after)


def test_a_value_below_a_secret_key_is_masked_at_any_depth() -> None:
    ctx = make_ctx()
    trace = run(ctx, lambda ctx: ctx.custom_data.update(credentials={"a": {"b": "s3cret"}})).trace
    assert [str(change) for change in trace[0].changes] == [
        "custom_data.credentials.a.b: <absent> -> ***"
    ]


def test_an_empty_dict_that_comes_is_a_change() -> None:
    trace = run(make_ctx(), lambda ctx: ctx.custom_data.update(empty={})).trace
    assert [str(change) for change in trace[0].changes] == ["custom_data.empty: <absent> -> {}"]


def test_an_object_is_named_by_its_class_since_its_repr_may_show_anything() -> None:
    trace = run(make_ctx(), lambda ctx: ctx.custom_data.update(client=Uncomparable())).trace
    assert trace[0].changes[0].after == "<Uncomparable>"


def test_writing_the_value_that_is_there_is_no_change() -> None:
    def same(ctx: CallbackCtx) -> None:
        ctx.runtime_env = {"env_vars": {"A": "1"}}
        ctx.worker_node_download_model = "MODEL_AND_TOKENIZER"

    ctx = make_ctx(runtime_env={"env_vars": {"A": "1"}})
    assert run(ctx, same).trace[0].changes == ()


def test_initial_values_are_nobodys_change() -> None:
    ctx = make_ctx(custom_data={"a": 1}, local_node_download_model="NONE")
    assert run(ctx, lambda ctx: None).trace[0].changes == ()


def test_a_change_is_charged_once_to_the_callback_that_made_it() -> None:
    ctx = run(
        make_ctx(),
        lambda ctx: ctx.custom_data.update(a=1),
        lambda ctx: None,
        lambda ctx: ctx.custom_data.update(b=1),
    )
    changed = [entry.changed for entry in ctx.trace]
    assert changed == [("custom_data.a",), (), ("custom_data.b",)]


def test_a_failing_callback_is_charged_with_what_it_changed() -> None:
    def change_then_fail(ctx: CallbackCtx) -> None:
        ctx.custom_data["a"] = 1
        raise ValueError("boom")

    ctx = make_ctx()
    manager = make_manager(changing("A", change_then_fail), on_error="warn")
    manager.hook.on_before_init(ctx=ctx)
    assert (ctx.trace[0].outcome, ctx.trace[0].changed) == ("warned", ("custom_data.a",))


def test_a_value_that_cannot_be_compared_counts_as_changed_when_assigned() -> None:
    ctx = run(
        make_ctx(),
        lambda ctx: ctx.custom_data.update(array=Uncomparable()),
        lambda ctx: None,
        lambda ctx: ctx.custom_data.update(array=Uncomparable()),
    )
    changed = [entry.changed for entry in ctx.trace]
    assert changed == [("custom_data.array",), (), ("custom_data.array",)]


def test_who_changed_a_value_finds_who_brought_the_dict_that_holds_it() -> None:
    trace = run(make_ctx(), lambda ctx: ctx.runtime_env.update(env_vars={"A": "1"})).trace
    assert trace.who_changed("runtime_env.env_vars.A") is trace[0]


def test_changes_around_the_yield_are_charged_to_the_wrapper() -> None:
    def changes(ctx: CallbackCtx) -> Wrapping:
        ctx.custom_data["before"] = 1
        result = yield
        ctx.custom_data["after"] = 1
        return result

    def changes_inside(ctx: CallbackCtx) -> Wrapping:
        ctx.runtime_env["inside"] = 1
        return (yield)

    ctx = make_ctx()
    call(wraps(changes), wraps(changes_inside) | {"name": "V"}, step("a"), ctx=ctx)
    assert {entry.callback: entry.changed for entry in ctx.trace} == {
        "W": ("custom_data.before", "custom_data.after"),
        "V": ("runtime_env.inside",),
        "a": ("custom_data.log",),
    }


def test_changes_before_a_nested_call_are_charged_to_the_caller() -> None:
    inner = make_manager(step("inner"))

    class Calls:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            ctx.runtime_env["mine"] = 1
            inner.hook.on_before_init(ctx=ctx)

    ctx = make_ctx()
    call(Calls, ctx=ctx)
    assert {entry.callback: entry.changed for entry in ctx.trace} == {
        "Calls": ("runtime_env.mine",),
        "inner": ("custom_data.log",),
    }


def test_a_conflict_is_a_warning_that_names_both(caplog: pytest.LogCaptureFixture) -> None:
    with hook_log(caplog):
        run(
            make_ctx(),
            lambda ctx: ctx.extra_init_kwargs.update(seed=1),
            lambda ctx: ctx.extra_init_kwargs.update(seed=2),
        )
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "callbacks 'A' and 'B' both set ctx.extra_init_kwargs.seed; "
        "'B' ran last and has the last word"
    )


def test_a_conflict_with_a_call_of_an_earlier_process(caplog: pytest.LogCaptureFixture) -> None:
    before = run(make_ctx(), lambda ctx: ctx.extra_init_kwargs.update(seed=1))
    ctx = make_ctx()
    recorder_of(ctx).begin_with([TraceEntry("Z", "on_configure", "driver", "n0"), *before.trace])
    with hook_log(caplog):
        make_manager(
            changing("A", lambda ctx: ctx.extra_init_kwargs.update(seed=2)),
            changing("B", lambda ctx: ctx.extra_init_kwargs.update(seed=3)),
        ).hook.on_before_init(ctx=ctx)
    assert [call.callback for call in ctx.trace] == ["Z", "A", "A", "B"]
    assert caplog.messages == [
        (
            "callbacks 'A' and 'B' both set ctx.extra_init_kwargs.seed; "
            "'B' ran last and has the last word"
        )
    ]


def test_a_conflict_of_three_names_the_two_in_each_step(caplog: pytest.LogCaptureFixture) -> None:
    with hook_log(caplog):
        run(
            make_ctx(),
            *(lambda ctx, n=n: ctx.extra_init_kwargs.update(seed=n) for n in range(3)),
        )
    assert [message.partition(" both")[0] for message in caplog.messages] == [
        "callbacks 'A' and 'B'",
        "callbacks 'B' and 'C'",
    ]


def test_a_conflict_below_a_dict_that_another_brought(caplog: pytest.LogCaptureFixture) -> None:
    with hook_log(caplog):
        run(
            make_ctx(),
            lambda ctx: ctx.runtime_env.update(env_vars={"HF_TOKEN": "1"}),
            lambda ctx: ctx.runtime_env["env_vars"].update(HF_TOKEN="2"),
        )
    assert len(caplog.messages) == 1
    assert "callbacks 'A' and 'B' both set ctx.runtime_env.env_vars" in caplog.text


def same_value(ctx: CallbackCtx) -> None:
    ctx.extra_init_kwargs["seed"] = 1


def own_key(ctx: CallbackCtx) -> None:
    ctx.extra_init_kwargs["dtype"] = "bfloat16"


@pytest.mark.parametrize("second", [same_value, own_key])
def test_no_conflict(second: Changing, caplog: pytest.LogCaptureFixture) -> None:
    with hook_log(caplog):
        run(make_ctx(), same_value, second)
    assert not caplog.messages


def test_no_conflict_with_oneself(caplog: pytest.LogCaptureFixture) -> None:
    def count(ctx: CallbackCtx) -> None:
        ctx.extra_init_kwargs["seed"] = ctx.extra_init_kwargs.get("seed", 0) + 1

    manager, ctx = make_manager(changing("A", count)), make_ctx()
    with hook_log(caplog):
        manager.hook.on_before_init(ctx=ctx)
        manager.hook.on_before_init(ctx=ctx)
    assert not caplog.messages


def test_shared_custom_data_is_no_conflict(caplog: pytest.LogCaptureFixture) -> None:
    with hook_log(caplog):
        run(
            make_ctx(),
            lambda ctx: ctx.custom_data.update(step=1),
            lambda ctx: ctx.custom_data.update(step=2),
        )
    assert not caplog.messages


def test_values_never_appear(caplog: pytest.LogCaptureFixture) -> None:
    with hook_log(caplog):
        ctx = run(
            make_ctx(),
            lambda ctx: ctx.runtime_env.update(env_vars={"TOKEN": "s3cret-1"}),
            lambda ctx: ctx.runtime_env.update(env_vars="s3cret-2"),
            lambda ctx: ctx.custom_data.update(password="s3cret-3"),
        )
    shown = repr(ctx.trace) + ctx.trace.table() + repr(list(ctx.trace)) + caplog.text
    assert "s3cret" not in shown


def test_who_is_running_is_told_before_it_starts() -> None:
    told: list[tuple[str, str, int]] = []

    class Runs:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            told.append(("started", "", 0))

    def on_call(entry: TraceEntry) -> None:
        told.append((entry.callback, entry.outcome, entry.attempt))

    ctx = make_ctx()
    Recorder(ctx, attempt=2, on_call=on_call)
    make_manager(Runs).hook.on_before_init(ctx=ctx)
    assert told == [("Runs", "running", 2), ("started", "", 0)]


def test_a_context_has_one_recorder() -> None:
    ctx = make_ctx()
    assert recorder_of(ctx) is recorder_of(ctx)
    made = Recorder(ctx)
    assert recorder_of(ctx) is made
    assert recorder_of(make_ctx()) is not made


def test_the_running_call_is_the_innermost_one() -> None:
    seen: list[Any] = []

    class Inner:
        def on_before_download(self, ctx: CallbackCtx) -> None:
            seen.append(recorder_of(ctx).running)

    inner = make_manager(Inner)

    class Outer:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            inner.hook.on_before_download(ctx=ctx)
            seen.append(recorder_of(ctx).running)

    ctx = make_ctx()
    make_manager(Outer).hook.on_before_init(ctx=ctx)
    assert [entry.callback for entry in seen] == ["Inner", "Outer"]
    assert recorder_of(ctx).running is None


def test_a_mode_that_a_callback_assigns_counts_as_assigned() -> None:
    ctx = run(make_ctx(), assign_mode)
    assert recorder_of(ctx).assigned == {"local_node_download_model"}


def test_a_mode_assigned_to_what_it_was_counts_too() -> None:
    def same(ctx: CallbackCtx) -> None:
        ctx.worker_node_download_model = ctx.worker_node_download_model

    ctx = run(make_ctx(), same)
    assert recorder_of(ctx).assigned == {"worker_node_download_model"}
    assert ctx.trace[0].changes == ()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_mode_assigned_outside_of_a_hook_does_not_count_as_assigned(when: str) -> None:
    ctx = make_ctx(local_node_download_model="NONE")
    recorder = recorder_of(ctx)
    if when == "before":
        ctx.local_node_download_model = "TOKENIZER_ONLY"
    run(ctx, lambda ctx: None)
    if when == "after":
        ctx.local_node_download_model = "TOKENIZER_ONLY"
    assert recorder.assigned == set()


def test_a_refused_mode_does_not_count_as_assigned() -> None:
    def wrong(ctx: CallbackCtx) -> None:
        with pytest.raises(ValueError, match="is not a download mode"):
            ctx.local_node_download_model = "NOEN"  # type: ignore[assignment]

    assert recorder_of(run(make_ctx(), wrong)).assigned == set()


def test_what_the_initialization_adopts_is_nobodys_change() -> None:
    ctx = make_ctx()
    recorder_of(ctx).adopt(runtime_env={"env_vars": {"A": "1"}})
    run(ctx, lambda ctx: None)
    assert ctx.runtime_env == {"env_vars": {"A": "1"}}
    assert ctx.trace[0].changes == ()
    assert recorder_of(ctx).assigned == set()


def test_what_took_over_and_the_nodes_are_set_by_the_recorder() -> None:
    ctx, handled = make_ctx(custom_data={"a": 1}), Handled("/m")
    result = NodeResult(ctx.node, "/m", {}, handled, 0.1, 0.2)
    other = NodeResult(NodeInfo("n2", "10.0.0.2", is_local=False), "/m", {"b": 2}, None, 0.1, 0.2)
    recorder = recorder_of(ctx)
    recorder.take_over(handled)
    recorder.set_nodes({"n1": result, "n2": other})
    recorder.set_own_custom_data()
    assert ctx.handled is handled
    assert {node: dict(found.custom_data) for node, found in ctx.nodes.items()} == {
        "n1": {"a": 1},
        "n2": {"b": 2},
    }
    ctx.custom_data["later"] = 1
    assert "later" not in ctx.nodes["n1"].custom_data


def test_own_custom_data_without_a_result_of_this_node_is_nothing() -> None:
    ctx = make_ctx(custom_data={"a": 1})
    recorder_of(ctx).set_own_custom_data()
    assert ctx.nodes == {}


def test_a_snapshot_copies_plain_containers_and_nothing_in_them() -> None:
    class Special(dict[str, int]):
        pass

    held, special = object(), Special(a=1)
    value: dict[str, Any] = {"list": [[held]], "special": special, "tuple": ([],)}
    copy = snapshot(value)
    assert copy == value
    assert copy["list"][0] is not value["list"][0]
    assert copy["list"][0][0] is held
    assert copy["special"] is special
    assert copy["tuple"] is value["tuple"]


def test_changes_between_are_in_the_order_of_the_later_one_with_the_deleted_last() -> None:
    before, after = {"gone": 1, "b": 1, "a": 1}, {"a": 2, "new": 1, "b": 2}
    found = changes_between(before, after)
    assert [change.path for change in found] == ["a", "new", "b", "gone"]


def test_what_is_compared_is_bounded_whatever_a_context_holds() -> None:
    big = {"list": list(range(1_000_000)), "dicts": [{n: n} for n in range(20_000)]}
    ctx = make_ctx(custom_data={"small": [1], **big})
    idle = [step(f"idle{number}", hook="on_after_init") for number in range(100)]
    started = time.process_time()  # of this process, whatever else the machine does
    call(*idle, ctx=ctx, hook="on_after_init")
    run(ctx, *[lambda ctx: ctx.custom_data.update(new=object())] * 5)
    assert time.process_time() - started < 1  # 3 s where a million items are compared


def test_of_a_large_container_its_length_and_identity_are_compared() -> None:
    class Grows:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            ctx.custom_data["big"] = list(range(20_000))

        def on_before_download(self, ctx: CallbackCtx) -> None:
            ctx.custom_data["big"][0] = "is not noticed"

        def on_after_init(self, ctx: CallbackCtx) -> None:
            ctx.custom_data["big"].append(1)
            ctx.custom_data["hf_token"] = ["s3cr3t"] * 20_000

    ctx, manager = make_ctx(), make_manager(Grows)
    for hook in ("on_before_init", "on_before_download", "on_after_init"):
        getattr(manager.hook, hook)(ctx=ctx)
    assert [[str(change) for change in entry.changes] for entry in ctx.trace] == [
        ["custom_data.big: <absent> -> <list of 20000 items>"],
        [],
        [
            "custom_data.big: <list of 20000 items> -> <list of 20001 items>",
            "custom_data.hf_token: <absent> -> ***",
        ],
    ]


def test_a_container_in_itself_is_no_trouble() -> None:
    class Circles:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            circle: list[object] = []
            circle.append(circle)
            ctx.custom_data["circle"] = circle

        def on_after_init(self, ctx: CallbackCtx) -> None:
            pass

    ctx, manager = make_ctx(), make_manager(Circles)
    manager.hook.on_before_init(ctx=ctx)
    manager.hook.on_after_init(ctx=ctx)
    assert [entry.changed for entry in ctx.trace] == [("custom_data.circle",), ()]
