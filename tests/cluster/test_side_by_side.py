"""The same Ray callbacks in Ray's own slot and in our list, through Ray's own engine start."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import s3
from plugins_for_tests import Plain

import rayserve_hooks
from rayserve_hooks import HookError
from rayserve_hooks.errors import FailureReport

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

BUNDLES = {"bundles": [{"CPU": 1}, {"other": 1}], "strategy": "STRICT_SPREAD"}
ONE_NODE = {"bundles": [{"CPU": 1}]}

# What travels between nodes, or differs on them. A process of each start imports an engine there.
ON_TWO_NODES = [
    *("SeesItsContext", "AsyncDownload", "StateOnSelf", "StateOnContext", "StateByGetState"),
    *("NamesOneObjectTwice", "KeysOfAnyKind", "CustomDataOfOtherKinds", "AddsVariables"),
    "TakesOver",
]
ON_ONE = [
    *("PlainMethods", "AssignsCustomData", "CustomDataThatIsNoDict", "CustomDataLikeADict"),
    *("ClearsCustomData", "NoRuntimeEnv", "SetsMode", "TakesOverWhenBuilt", "ReplacesItsContext"),
    *("RunsItself", "RunsNothing", "TakesArguments"),
]
WAYS = [*((name, BUNDLES) for name in ON_TWO_NODES), *((name, ONE_NODE) for name in ON_ONE)]
FAILURES = [
    *("FailsBefore", "FailsInDownload", "FailsAfter", "FailsWhenBuilt", "AlwaysRaises"),
    *("NeverRaises", "ChangesItsMind", "SettlesItself", "FailsToRun"),
]


class StartedError(Exception):
    """Ends a start where Ray goes on to build vLLM's engine."""


def start(config: Any) -> dict[str, Any]:
    """Return what Ray's own start hands to the engine, or which error it ends with."""
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

    handed: dict[str, Any] = {}

    class Engine(VLLMEngine):  # all but the engine itself is Ray's
        def _prepare_engine_config(self, callback_ctx: Any) -> Any:
            handed["runtime_env"] = callback_ctx.runtime_env or {}
            handed["bundles"] = callback_ctx.placement_group.bundle_specs
            engine: Any = self.llm_config.get_engine_config()
            handed["model"] = engine.hf_model_id
            raise StartedError

    engine = Engine(config)
    with contextlib.suppress(Exception):  # of a constructor; the start runs into it again
        # Stock does not wait for it, and outside of a replica may find a group without nodes.
        config.get_or_create_callback().ctx.placement_group.wait(60)
    try:
        asyncio.run(engine.start())
    except StartedError:
        return handed
    except Exception as error:
        return {"error": innermost(error)}
    raise AssertionError("the engine was built")


def innermost(error: BaseException) -> BaseException:
    """Return what led to an error in the end, past what only reports it."""
    cause = getattr(error, "cause", None) or error.__cause__
    if isinstance(cause, FailureReport):
        cause = cause.__context__
    return innermost(cause) if cause else error


def in_stock(name: str, kwargs: dict[str, Any], raises: bool, **fields: Any) -> Any:
    from ray.serve.llm import LLMConfig

    settings: Any = {
        "callback_class": f"stock_callbacks.{name}",
        "callback_kwargs": kwargs,
        "raise_error_on_callback": raises,
    }
    return LLMConfig(callback_config=settings, **fields)


def in_ours(name: str, kwargs: dict[str, Any], raises: bool, **fields: Any) -> Any:
    on_error = "raise" if raises else "warn"
    entry = {"callback": f"stock_callbacks:{name}", "kwargs": kwargs, "on_error": on_error}
    return rayserve_hooks.LLMConfig(callbacks=[entry], **fields)


def lines(log: Path) -> list[str]:
    """Return what was written; the nodes' order is nobody's."""
    return sorted(log.read_text().splitlines()) if log.exists() else []


def both(
    name: str,
    folder: Path,
    raises: bool = True,
    fields: Any = None,
    group: Any = BUNDLES,
    **kwargs: Any,
) -> tuple[tuple[dict[str, Any], list[str]], ...]:
    found = []
    for make in (in_stock, in_ours):
        log = folder / make.__name__
        loading = {"model_loading_config": {"model_id": "tiny"}}
        given = loading if fields is None else fields(make.__name__)
        given = {**given, "placement_group_config": group}
        handed = start(make(name, {"log": str(log), **kwargs}, raises, **given))
        found.append((handed, lines(log)))
    return tuple(found)


@pytest.mark.parametrize(("name", "group"), WAYS, ids=[name for name, _ in WAYS])
def test_both_see_and_do_the_same(name: str, group: Any, tmp_path: Path) -> None:
    (handed, wrote), (ours, we_wrote) = both(name, tmp_path, group=group)
    assert (ours, we_wrote) == (handed, wrote)
    assert wrote
    assert "error" not in handed


@pytest.mark.parametrize("raises", [True, False], ids=["raise", "warn"])
@pytest.mark.parametrize("name", FAILURES)
def test_both_fail_or_go_on(name: str, raises: bool, tmp_path: Path) -> None:
    group = BUNDLES if raises or name == "FailsInDownload" else ONE_NODE
    (handed, wrote), (ours, we_wrote) = both(name, tmp_path, raises, group=group)
    assert handed.keys() == ours.keys()
    # From another process Ray's comes without its cause; its text ends with the cause's.
    assert str(handed.pop("error", "")).endswith(str(ours.pop("error", "")))
    assert ours == handed
    if name != "FailsInDownload" or not raises:  # of two nodes that fail at once one may be stopped
        assert we_wrote == wrote


@pytest.mark.parametrize(
    "mode", ["MODEL_AND_TOKENIZER", "TOKENIZER_ONLY", "EXCLUDE_SAFETENSORS", "NONE", None]
)
def test_both_download_the_same(
    mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = BUNDLES if mode == "MODEL_AND_TOKENIZER" else ONE_NODE
    model = tmp_path / "bucket" / "tiny"
    model.mkdir(parents=True)
    (model / "hash").write_text("0123abcd")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (model / name).write_text("{}")
    with s3.serving(tmp_path) as server:
        settings = {"AWS_ENDPOINT_URL": server.url, "AWS_DEFAULT_REGION": "us-east-1"}

        def fields(side: str) -> dict[str, Any]:
            variables = {**settings, "HF_HOME": str(tmp_path / "home" / side)}
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            source = {"bucket_uri": "s3://anonymous@bucket/tiny"}
            return {
                "model_loading_config": {"model_id": "tiny", "model_source": source},
                "runtime_env": {"env_vars": variables},
            }

        (theirs, _), (ours, _) = both("SetsMode", tmp_path, fields=fields, group=group, mode=mode)
    assert [theirs.get("error"), ours.get("error")] == [None, None]
    stock, here = (downloaded(tmp_path / "home" / side) for side in ("in_stock", "in_ours"))
    assert here == stock
    assert bool(stock) == (mode != "NONE")


def downloaded(home: Path) -> set[str]:
    return {path.name for path in home.rglob("snapshots/*/*") if path.name != "hash"}


@pytest.mark.parametrize(
    ("name", "attribute"), [("DoesNotPickle", "opened"), ("ContextDoesNotPickle", "ctx.opened")]
)
def test_what_does_not_pickle_fails_in_both(name: str, attribute: str, tmp_path: Path) -> None:
    (stock, _), _ = both(name, tmp_path)
    assert "cannot pickle 'generator' object" in str(stock["error"])
    with pytest.raises(
        HookError,
        match=rf"^callback '{name}' failed in hook on_before_download on node .*: cannot be "
        rf"sent to another node: TypeError: its attribute '{attribute}', a generator: cannot "
        r"pickle 'generator' object; open such things in "
        r"on_before_download_model_files_distributed, or leave them out in __getstate__; set "
        rf"RAYSERVE_HOOKS_DISABLE={name} to start once without it$",
    ):
        initialize(name, tmp_path / "log")


def initialize(name: str, log: Path, *others: Any) -> rayserve_hooks.CallbackCtx:
    config = rayserve_hooks.LLMConfig(
        model_id="tiny",
        callbacks=[
            *others,
            {"callback": f"stock_callbacks:{name}", "kwargs": {"log": str(log)}},
        ],
        placement_group_config=BUNDLES,
    )
    return asyncio.run(rayserve_hooks.initialize_node(config))


# Where they differ on purpose: docs/migration.md.


def test_one_that_nothing_runs_of_on_a_node_need_not_pickle(tmp_path: Path) -> None:
    assert len(initialize("DoesNotPickleAndIsNotNeeded", tmp_path / "log").nodes) == 2


class Leaves:
    def on_before_init(self, ctx: rayserve_hooks.CallbackCtx) -> None:
        ctx.custom_data["of another"] = 1


@pytest.mark.parametrize("name", ["AssignsCustomData", "ClearsCustomData"])
def test_what_others_have_in_custom_data_stays(name: str, tmp_path: Path) -> None:
    ctx = initialize(name, tmp_path / "log", Leaves)
    kept = {"kept": 2} if name == "AssignsCustomData" else {}
    assert ctx.custom_data == {"of another": 1, **kept}
    for node in ctx.nodes.values():
        assert node.custom_data == ctx.custom_data


def test_keys_of_any_kind_reach_the_other_callbacks_on_all_nodes(tmp_path: Path) -> None:
    ctx = initialize("KeysOfAnyKind", tmp_path / "log", Plain)
    assert [node.custom_data[0] for node in ctx.nodes.values()] == ["zero", "zero"]  # type: ignore[index]


def test_a_second_initialization_has_an_instance_of_its_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for model_id in ("one", "two"):
        entry = {"callback": "stock_callbacks:SeesItsContext", "kwargs": {"log": str(log)}}
        config = rayserve_hooks.LLMConfig(
            model_loading_config={"model_id": model_id, "model_source": "tiny"},
            callbacks=[entry],
            placement_group_config={"bundles": [{"CPU": 1}]},
        )
        for _ in range(2):
            asyncio.run(rayserve_hooks.initialize_node(config))
    seen = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line[2][6] for line in seen if line[0] == "before"] == ["one", "one", "two", "two"]
    assert all(line[2][4] is True for line in seen)
