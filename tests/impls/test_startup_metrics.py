"""That Prometheus can scrape them is shown by the demo, whose run is a test."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import pytest

import rayserve_hooks
from rayserve_hooks.errors import CallbackConfigError
from rayserve_hooks.impls.startup_metrics import StartupMetrics


@pytest.mark.ray
def test_the_log_line_has_every_phase(ray_cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("ray.serve").propagate = True
    config = rayserve_hooks.LLMConfig(
        model_id="tiny",
        callbacks=["startup_metrics"],
        placement_group_config={"bundles": [{"CPU": 1}]},
    )
    asyncio.run(rayserve_hooks.initialize_node(config))
    seconds = r"\d+\.\d{3} s"
    node = rf"\(node {ray_cluster.head_id[:8]}\)"
    assert re.search(
        rf"start-up of tiny: before_init {seconds}, nodes {seconds}, after_init {seconds}, "
        rf"total {seconds}, before_download {seconds} {node}, download {seconds} {node}$",
        caplog.text,
        re.MULTILINE,
    )


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {"buckets": [1]}, " has unknown argument 'buckets'; drop it"),
        ((), {"kwargs": {}, "name": "m"}, " has unknown argument 'name'; drop it"),
    ],
)
def test_it_takes_no_arguments(args: Any, kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(CallbackConfigError, match=f"StartupMetrics{text}$"):
        StartupMetrics(*args, **kwargs)
