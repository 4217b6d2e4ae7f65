from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

import rayserve_hooks
from rayserve_hooks.errors import CallbackConfigError
from rayserve_hooks.impls.custom_placement_group import CustomPlacementGroup


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"bundles": []}, r"CustomPlacementGroup\(bundles=\[\]\): give at least one bundle"),
        ({"bundles": [{"CPU": 1}, {}]}, r"bundles\[1\]=\{\}\): write resources and amounts"),
        ({"bundles": [{"CPU": -1}]}, r"bundles\[0\]=\{'CPU': -1\}\): write resources and amounts"),
        (
            {"bundles": [{"CPU": 1}], "strategy": "SPRAED"},
            r"strategy='SPRAED'\): use one of PACK, SPREAD, STRICT_PACK, STRICT_SPREAD",
        ),
        (
            {"bundles": [{"CPU": "1"}]},
            r"^CustomPlacementGroup\(bundles\[0\]\['CPU'\]='1'\): write a n",
        ),
        ({"bundles": [{"GPU": True}]}, r"\(bundles\[0\]\['GPU'\]=True\): write a number$"),
        ({"bundles": [{"CPU": 1}, "GPU"]}, r"\(bundles\[1\]='GPU'\): write a mapping$"),
        ({"bundles": {"CPU": 1}}, r"\(bundles=\{'CPU': 1\}\): write a list$"),
        ({"bundles": "CPU"}, r"\(bundles='CPU'\): write a list, even of one item$"),
        ({"bundles": [{1: 1}]}, r"Group\(bundles\[0\]\) has key 1; write a string$"),
        ({"bundles": [{"CPU": 0}]}, r"bundles\[0\]=\{'CPU': 0\}\): write resources and amounts"),
        ({"bundles": [{"CPU": math.nan}]}, r"\[0\]=\{'CPU': nan\}\): write resources and amounts"),
        ({"bundles": [{"CPU": math.inf}]}, r"\[0\]=\{'CPU': inf\}\): write resources and amounts"),
        ({"bundles": [{"CPU": 1}], "name": 7}, r"CustomPlacementGroup\(name=7\): write a string$"),
        ({"strategy": "PACK"}, r"^CustomPlacementGroup has no argument 'bundles'; add it$"),
        (
            {"bundles": [{"CPU": 1}], "stratgy": "PACK"},
            r"^CustomPlacementGroup has unknown argument 'stratgy'; did you mean 'strategy'\?$",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(CallbackConfigError, match=text):
        CustomPlacementGroup(**arguments)


def test_all_wrong_arguments_are_reported_together() -> None:
    with pytest.raises(CallbackConfigError, match=r"^3 problems:") as caught:
        CustomPlacementGroup([{}, {"CPU": "1"}], "SPRAED")  # type: ignore[dict-item, arg-type]
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "CustomPlacementGroup(bundles[0]={})",
        "CustomPlacementGroup(bundles[1]['CPU']='1')",
        "CustomPlacementGroup(strategy='SPRAED')",
    ]


def test_bundles_as_yaml_and_as_python_write_them() -> None:
    assert CustomPlacementGroup(({"CPU": 1, "GPU": 0.5},)).bundles == [{"CPU": 1, "GPU": 0.5}]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_group_is_made_and_used() -> None:
    from ray.util.placement_group import placement_group_table, remove_placement_group

    arguments = {"bundles": [{"CPU": 1}, {"CPU": 1}], "strategy": "STRICT_PACK", "name": "mine"}
    config = rayserve_hooks.LLMConfig(
        model_id="tiny",
        callbacks=[{"callback": "custom_placement_group", "kwargs": arguments}],
        placement_group_config={"bundles": [{"CPU": 1}]},
    )
    ctx = asyncio.run(rayserve_hooks.initialize_node(config))
    assert ctx.placement_group is not None
    table = placement_group_table(ctx.placement_group)
    remove_placement_group(ctx.placement_group)
    assert (table["name"], table["strategy"], table["state"]) == ("mine", "STRICT_PACK", "CREATED")
    assert table["bundles"] == {0: {"CPU": 1.0}, 1: {"CPU": 1.0}}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_group_goes_when_the_initialization_fails() -> None:
    from ray.util.placement_group import placement_group_table

    config = rayserve_hooks.LLMConfig(
        model_id="tiny",
        callbacks=[
            {
                "callback": "custom_placement_group",
                "kwargs": {"bundles": [{"CPU": 1}], "name": "of a failed one"},
            },
            {"callback": "lifecycle_callbacks:Fail", "kwargs": {"hook": "on_before_download"}},
        ],
    )
    with pytest.raises(rayserve_hooks.HookError, match="no such bucket"):
        asyncio.run(rayserve_hooks.initialize_node(config))
    groups = placement_group_table().values()
    assert {g["state"] for g in groups if g["name"] == "of a failed one"} == {"REMOVED"}
