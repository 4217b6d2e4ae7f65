import os
from collections.abc import Callable

import pytest
from plugins_for_tests import hook_log, make_ctx, make_manager

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.trace import ABSENT, Change, Trace, TraceEntry, format_table

Changing = Callable[[CallbackCtx], object]


def step(name: str, change: Changing) -> dict[str, object]:
    class Step:
        def on_before_init(self, ctx: CallbackCtx) -> None:
            change(ctx)

    return {"callback": Step, "name": name}


def run(ctx: CallbackCtx, *changes: Changing) -> CallbackCtx:
    """Run one callback per change, named A, B, C..."""
    steps = [step(name, change) for name, change in zip("ABCDE", changes, strict=False)]
    make_manager(*steps).hook.on_before_init(ctx=ctx)
    return ctx


DEFAULT = "MODEL_AND_TOKENIZER"


class Uncomparable:
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no truth value")

    __hash__ = None  # type: ignore[assignment]


def test_an_entry_says_who_ran_where_and_how_it_ended() -> None:
    ctx = run(make_ctx(role="replica"), lambda ctx: None)
    (entry,) = ctx.trace
    assert (entry.callback, entry.hook) == ("A", "on_before_init")
    assert (entry.role, entry.node_id, entry.pid) == ("replica", "n1", os.getpid())
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


def test_a_first_result_is_handled_and_ends_the_trace() -> None:
    class Takes:
        def on_before_init(self, ctx: CallbackCtx) -> Handled:
            return Handled("/m")

    class Never(Takes):
        pass

    ctx = make_ctx()
    make_manager(Takes, Never).hook.on_before_init(ctx=ctx)
    assert [(entry.callback, entry.outcome) for entry in ctx.trace] == [("Takes", "handled")]


def test_the_trace_is_a_sequence_in_start_order() -> None:
    trace = run(make_ctx(), lambda ctx: None, lambda ctx: None, lambda ctx: None).trace
    assert [entry.callback for entry in trace] == ["A", "B", "C"]
    assert trace[-1].callback == "C"
    assert [entry.callback for entry in trace[:2]] == ["A", "B"]
    assert len(trace) == 3


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


def test_a_change_reads_as_path_and_both_values() -> None:
    assert str(Change("extra_init_kwargs.seed", "1", "2")) == "extra_init_kwargs.seed: 1 -> 2"


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
    manager = make_manager(step("A", change_then_fail), on_error="warn")
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


def test_who_changed_finds_the_last_call() -> None:
    trace = run(
        make_ctx(),
        lambda ctx: ctx.custom_data.update(a=1),
        lambda ctx: ctx.custom_data.update(a=2),
        lambda ctx: ctx.custom_data.update(b=1),
    ).trace
    assert trace.who_changed("custom_data.a") is trace[1]


def test_who_changed_a_field_finds_changes_in_it() -> None:
    ctx = make_ctx(runtime_env={"env_vars": {}})
    trace = run(ctx, lambda ctx: ctx.runtime_env["env_vars"].update(A="1")).trace
    assert trace.who_changed("runtime_env") is trace[0]
    assert trace.who_changed("runtime_env.env_vars") is trace[0]


def test_who_changed_a_value_finds_who_brought_the_dict_that_holds_it() -> None:
    trace = run(make_ctx(), lambda ctx: ctx.runtime_env.update(env_vars={"A": "1"})).trace
    assert trace.who_changed("runtime_env.env_vars.A") is trace[0]


def test_who_changed_does_not_take_one_name_for_the_start_of_another() -> None:
    trace = run(make_ctx(), lambda ctx: ctx.custom_data.update(model_path="/m")).trace
    assert trace.who_changed("custom_data.model") is None


def test_who_changed_is_none_when_nobody_did() -> None:
    assert run(make_ctx(), lambda ctx: None).trace.who_changed("runtime_env") is None


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

    manager, ctx = make_manager(step("A", count)), make_ctx()
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


def test_the_table_is_aligned() -> None:
    ctx = run(
        make_ctx(),
        lambda ctx: ctx.custom_data.update(a_rather_long_key=1, other=2),
        lambda ctx: None,
    )
    header, rule, *rows = ctx.trace.table().splitlines()
    starts = [i for i, char in enumerate(rule) if char == "-" and (i == 0 or rule[i - 1] == " ")]
    columns = [
        [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        for line in (header, *rows)
    ]
    assert columns[0] == ["hook", "callback", "process", "pid", "node", "ms", "outcome", "changed"]
    assert columns[1][:5] == ["on_before_init", "A", "driver", str(os.getpid()), "n1"]
    assert columns[1][6:] == [
        "returned",
        "custom_data.a_rather_long_key: <absent> -> 1, custom_data.other: <absent> -> 2",
    ]
    assert columns[2][1] == "B"


def test_the_table_of_nothing_is_its_header() -> None:
    header, rule = Trace().table().splitlines()
    assert header.split()[0] == "hook"
    assert set(rule) == {"-", " "}


def test_a_running_call_has_an_empty_time() -> None:
    trace = Trace()
    trace.add(TraceEntry("A", "on_before_init", "node", "0123456789"))
    cells = trace.table().splitlines()[2].split()
    assert cells == ["on_before_init", "A", "node", str(os.getpid()), "01234567", "running"]


def test_the_table_names_what_ran_in_the_background_and_a_later_attempt() -> None:
    trace = Trace()
    trace.add(TraceEntry("A", "on_before_init", "node", "n1", background="warm_up"))
    trace.add(TraceEntry("A", "on_before_init", "node", "n1", attempt=2))
    first, second = trace.table().splitlines()[2:]
    assert first.split()[1] == "A/warm_up"
    assert second.endswith("running, attempt 2")


def test_an_entry_knows_how_long_it_has_been_running() -> None:
    entry = TraceEntry("A", "on_before_init", "node", "n1")
    assert 0 <= entry.running_s <= entry.running_s


def test_only_the_first_end_of_a_call_counts() -> None:
    entry = TraceEntry("A", "on_before_init", "node", "n1")
    entry.finish("timed out")
    duration = entry.duration_s
    entry.finish("returned")
    assert (entry.outcome, entry.duration_s) == ("timed out", duration)


def test_repr_is_the_table_with_a_count() -> None:
    trace = run(make_ctx(), lambda ctx: None).trace
    assert repr(trace) == f"<Trace of 1 calls>\n{trace.table()}"


def test_format_table_leaves_no_trailing_blanks() -> None:
    table = format_table(("a", "long name"), [("1", ""), ("22", "x")])
    assert table == "a   long name\n--  ---------\n1\n22  x"


def test_entries_of_another_node_follow() -> None:
    here = run(make_ctx(), lambda ctx: None).trace
    entry = TraceEntry("Z", "on_before_download", "node", "n2")
    here.extend([entry])
    assert here[-1] is entry
