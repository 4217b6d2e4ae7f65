import dataclasses
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest
from pydantic import TypeAdapter

from rayserve_hooks.core.hooks import HOOKS
from rayserve_hooks.core.limits import TimeLimits
from rayserve_hooks.errors import CallbackConfigError

NAMES = ", ".join([*HOOKS, "download", "total"])


def refused(text: str) -> Any:
    return pytest.raises(CallbackConfigError, match=f"^{re.escape(text)}$")


def test_every_hook_has_a_limit() -> None:
    names = [field.name for field in dataclasses.fields(TimeLimits)]
    assert ", ".join(names) == NAMES
    assert set(HOOKS) < set(names)


def test_what_may_download_has_no_limit_by_default() -> None:
    limits = TimeLimits()
    assert limits.on_before_download is limits.download is limits.total is None


def test_nothing_given_is_the_defaults() -> None:
    assert TimeLimits.parse({}) == TimeLimits()


def test_what_is_given_counts_and_the_rest_stays() -> None:
    limits = TimeLimits.parse({"total": 3600, "on_before_init": 0.5})
    assert limits == TimeLimits(total=3600, on_before_init=0.5)


def test_null_is_no_limit() -> None:
    assert TimeLimits.parse({"on_after_init": None}).on_after_init is None


@pytest.mark.parametrize("wrong", [None, 60, ["total"], "60"])
def test_limits_that_are_no_mapping(wrong: object) -> None:
    with refused(f"time_limits is {wrong!r}; write a mapping from {NAMES} to seconds"):
        TimeLimits.parse(wrong)


def test_a_misspelt_name() -> None:
    with refused("time_limits has unknown key 'downlod'; did you mean 'download'?"):
        TimeLimits.parse({"downlod": 60})


@pytest.mark.parametrize("name", ["zzz", 7])
def test_an_unlike_name_gets_the_list_of_names(name: object) -> None:
    with refused(f"time_limits has unknown key {str(name)!r}; use one of {NAMES}"):
        TimeLimits.parse({name: 60})


@pytest.mark.parametrize("wrong", [0, -1, True, False, "60", "inf", [60], {"s": 1}, float("nan")])
def test_a_value_that_is_no_positive_number(wrong: object) -> None:
    with refused(
        f"time_limits: total is {wrong!r}; write seconds, more than 0, or null for no limit"
    ):
        TimeLimits.parse({"total": wrong})


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(CallbackConfigError, match=r"^2 problems:") as caught:
        TimeLimits.parse({"total": 0, "downlod": 60})
    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        "time_limits: total is 0",
        "time_limits has unknown key 'downlod'",
    ]


def test_nothing_is_converted_on_the_way() -> None:
    limits = TimeLimits.parse({"total": 60, "download": None})
    assert (limits.total, limits.download) == (60.0, None)


def test_limits_are_values() -> None:
    limits = TimeLimits.parse({"total": 60})
    assert {limits: 1}[TimeLimits(total=60)] == 1
    assert TimeLimits(*range(1, 11)).total == 10
    assert pickle.loads(pickle.dumps(limits)) == limits
    with pytest.raises(dataclasses.FrozenInstanceError):
        limits.total = 7  # type: ignore[misc]


def test_the_json_schema_names_each_limit_and_its_unit() -> None:
    schema = TypeAdapter(TimeLimits).json_schema()
    assert ", ".join(schema["properties"]) == NAMES
    assert schema["additionalProperties"] is False
    for field in schema["properties"].values():
        assert re.fullmatch(r"Seconds for .*; null for no limit\.", field["description"])
        assert field["anyOf"] == [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]
    assert schema["properties"]["on_init_failed"]["default"] == 60.0


def test_importing_them_builds_no_schema() -> None:
    program = (
        "import sys, rayserve_hooks.core.limits\n"
        "assert 'pydantic._internal._generate_schema' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
