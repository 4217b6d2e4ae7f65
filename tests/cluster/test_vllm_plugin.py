"""What vLLM loads in each of its processes: nothing at all without our mark."""

from __future__ import annotations

import configparser
import importlib
from pathlib import Path

import pytest
from plugins_for_tests import run_script

from rayserve_hooks.cluster import _vllm, engine_process, vllm_plugin

SETUP = Path(__file__).parent.parent.parent / "setup.cfg"


def test_the_entry_point_names_the_function() -> None:
    config = configparser.ConfigParser()
    config.read(SETUP)
    name, _, value = config["options.entry_points"][_vllm.GROUP].strip().partition(" = ")
    assert name == _vllm.PLUGIN
    module, _, function = value.partition(":")
    assert getattr(importlib.import_module(module), function) is vllm_plugin.run_hooks


def test_without_the_mark_it_imports_nothing() -> None:
    run_script(
        """
        import sys
        from rayserve_hooks.cluster.vllm_plugin import run_hooks
        run_hooks()
        ours = {name for name in sys.modules if name.startswith("rayserve_hooks")}
        assert ours == {
            "rayserve_hooks", "rayserve_hooks.cluster", "rayserve_hooks.cluster.vllm_plugin"
        }, ours
        assert not {"ray", "pluggy", "pydantic", "asyncio"} & set(sys.modules)
        """
    )


def test_with_the_mark_the_hooks_of_that_start_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(engine_process, "run_hooks_here", ran.append)
    monkeypatch.setenv(vllm_plugin.MARK, "feed-n1")
    vllm_plugin.run_hooks()
    assert ran == ["feed-n1"]


def test_the_mark_is_no_variable_of_vllms() -> None:
    assert not vllm_plugin.MARK.startswith("VLLM_")  # of which it refuses unknown ones
