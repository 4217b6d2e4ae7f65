"""From a config, ours or Ray's, to its stack."""


OURS = "rayserve_hooks.HooksCallback"


def test_a_stack_is_read_from_a_callback_config() -> None:
    kwargs = {"callbacks": [Empty], "time_limits": {"total": 60}}
    stack = parse_stack("app", OURS, kwargs, "warn")
    assert [entry.name for entry in stack.entries] == ["Empty"]
    assert (stack.on_error, stack.time_limits) == ("warn", TimeLimits(total=60))


def test_a_stack_without_anything_is_empty() -> None:
    assert parse_stack("app", OURS, {}) == CallbackStack("app", ())


def test_another_callback_class_is_a_stack_of_one() -> None:
    (entry,) = parse_stack("app", "ray_callbacks:Strict", {"paths": []}).entries
    assert (entry.name, entry.kwargs) == ("Strict", {"paths": []})


def test_an_unknown_key_of_callback_kwargs() -> None:
    text = (
        "callback_kwargs has unknown key 'callback'; HooksCallback takes 'callbacks', a list, and "
        "'time_limits', a mapping"
    )
    with pytest.raises(CallbackConfigError, match=f"^{text}$"):
        parse_stack("app", OURS, {"callback": "x"})


def test_keys_callbacks_and_limits_that_are_wrong_are_reported_together() -> None:
    kwargs = {"zzz": 1, "callbacks": [None], "time_limits": {"total": 0}}
    with pytest.raises(CallbackConfigError) as caught:
        parse_stack("app", OURS, kwargs)
    assert [problem.partition(" ")[0] for problem in caught.value.problems] == [
        "callback_kwargs",
        "callbacks[0]",
        "time_limits:",
    ]
