import os
import pickle

import pytest

from rayserve_hooks.trace import ABSENT, Change, Trace, TraceEntry, format_table


def ran(callback: str, **changes: str) -> TraceEntry:
    """Return a call that has ended; ``changes`` are new values by path, ``__`` for a dot."""
    entry = TraceEntry(callback, "on_before_init", "driver", "n1")
    entry.changes = tuple(
        Change(path.replace("__", "."), ABSENT, value) for path, value in changes.items()
    )
    entry.finish("returned")
    return entry


def trace_of(*entries: TraceEntry) -> Trace:
    trace = Trace()
    for entry in entries:
        trace.append(entry)
    return trace


def test_the_trace_is_a_sequence_in_start_order() -> None:
    trace = trace_of(ran("A"), ran("B"), ran("C"))
    assert [entry.callback for entry in trace] == ["A", "B", "C"]
    assert trace[-1].callback == "C"
    assert [entry.callback for entry in trace[:2]] == ["A", "B"]
    assert len(trace) == 3


def test_an_entry_begins_here_and_now_and_is_running() -> None:
    entry = TraceEntry("A", "on_before_init", "replica", "n1")
    assert (entry.pid, entry.outcome, entry.duration_s) == (os.getpid(), "running", None)
    assert (entry.changes, entry.reason, entry.background, entry.attempt) == ((), "", "", 1)
    assert entry.start > 0


def test_a_change_reads_as_path_and_both_values() -> None:
    assert str(Change("extra_init_kwargs.seed", "1", "2")) == "extra_init_kwargs.seed: 1 -> 2"


def test_what_an_entry_changed_is_the_paths_of_its_changes() -> None:
    entry = ran("A", custom_data__a="1", runtime_env="{}")
    assert entry.changed == ("custom_data.a", "runtime_env")


def test_who_changed_finds_the_last_call() -> None:
    trace = trace_of(
        ran("A", custom_data__a="1"), ran("B", custom_data__a="2"), ran("C", custom_data__b="1")
    )
    assert trace.who_changed("custom_data.a") is trace[1]


def test_who_changed_a_field_finds_changes_in_it() -> None:
    trace = trace_of(ran("A", runtime_env__env_vars__A="1"))
    assert trace.who_changed("runtime_env") is trace[0]
    assert trace.who_changed("runtime_env.env_vars") is trace[0]


def test_who_changed_does_not_take_one_name_for_the_start_of_another() -> None:
    trace = trace_of(ran("A", custom_data__model_path="/m"))
    assert trace.who_changed("custom_data.model") is None


def test_who_changed_is_none_when_nobody_did() -> None:
    assert trace_of(ran("A")).who_changed("runtime_env") is None


def test_the_table_is_aligned() -> None:
    trace = trace_of(ran("A", custom_data__a_rather_long_key="1", custom_data__other="2"), ran("B"))
    header, rule, *rows = trace.table().splitlines()
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
    trace.append(TraceEntry("A", "on_before_init", "node", "0123456789"))
    cells = trace.table().splitlines()[2].split()
    assert cells == ["on_before_init", "A", "node", str(os.getpid()), "01234567", "running"]


def test_the_table_names_what_ran_in_the_background_and_a_later_attempt() -> None:
    trace = Trace()
    trace.append(TraceEntry("A", "on_before_init", "node", "n1", background="warm_up"))
    trace.append(TraceEntry("A", "on_before_init", "node", "n1", attempt=2))
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
    trace = trace_of(ran("A"))
    assert repr(trace) == f"<Trace of 1 calls>\n{trace.table()}"


def test_format_table_leaves_no_trailing_blanks() -> None:
    table = format_table(("a", "long name"), [("1", ""), ("22", "x")])
    assert table == "a   long name\n--  ---------\n1\n22  x"


def test_entries_of_another_node_follow() -> None:
    here = trace_of(ran("A"))
    entry = TraceEntry("Z", "on_before_download", "node", "n2")
    here.extend([entry])
    assert here[-1] is entry


def test_an_entry_travels() -> None:
    entry = ran("A", custom_data__a="1")
    assert pickle.loads(pickle.dumps(entry)) == entry


def test_a_change_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Change("a", "1", "2").path = "b"  # type: ignore[misc]
