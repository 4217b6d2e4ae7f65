"""Whole starts of a replica on simulated nodes: no Ray, no engine, milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from model_from_share import ModelFromShare

from rayserve_hooks.errors import CallbackConfigError
from rayserve_hooks.testing import Fail, ModelConfig, RunStack


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """Return a share with one model."""
    folder = tmp_path / "share"
    (folder / "tiny").mkdir(parents=True)
    (folder / "tiny" / "config.json").write_text("{}")
    return folder


def on(share: Path) -> dict[str, Any]:
    return {"callback": ModelFromShare, "kwargs": {"folder": str(share)}}


def test_each_node_uses_the_share(run_stack: RunStack, share: Path) -> None:
    outcome = run_stack(on(share), nodes=2).assert_succeeded()
    assert outcome.model_path == str(share / "tiny")
    assert [node.handled is not None for node in outcome.nodes.values()] == [True, True]
    outcome.assert_order(
        [
            "replica: on_before_init: ModelFromShare",
            "replica: on_before_download: ModelFromShare (handled)",
            "node-2: on_before_download: ModelFromShare (handled)",
        ]
    )


def test_what_is_not_there_is_downloaded(run_stack: RunStack, share: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("{}")
    config = ModelConfig("other", model_source=elsewhere)
    outcome = run_stack(on(share), config).assert_succeeded()
    assert "snapshots" in outcome.model_path
    assert f"INFO: ModelFromShare: {share / 'other'} is not on the share" in outcome.log


def test_it_works_beside_one_that_fails(run_stack: RunStack, share: Path) -> None:
    failing = Fail("on_after_init", OSError("no space"))
    error = run_stack([on(share), failing]).assert_failed("no space", callback="Fail")
    assert not error.cleanup_errors


def test_a_config_that_names_no_folder_is_refused(run_stack: RunStack) -> None:
    with pytest.raises(CallbackConfigError, match="has no argument 'folder'; add it"):
        run_stack({"callback": ModelFromShare})


def test_a_config_finds_it_by_its_short_name(run_stack: RunStack, share: Path) -> None:
    named = {"callback": "model_from_share", "kwargs": {"folder": str(share)}}
    outcome = run_stack(named, installed=["model_from_share"]).assert_succeeded()
    assert outcome.model_path == str(share / "tiny")
