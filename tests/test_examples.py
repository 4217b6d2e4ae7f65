"""What the documentation shows of the examples: a callback tested by hand, checked arguments."""

import configparser
import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from engine_size import EngineSize
from hub_token import HubToken
from my_module import MyCallback
from plugins_for_tests import parse_callbacks

from rayserve_hooks import CallbackCtx, get_plugin_manager
from rayserve_hooks.errors import CallbackConfigError
from rayserve_hooks.testing import RunStack, TakeOver

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_my_callback_limits_the_engine() -> None:
    ctx = CallbackCtx(llm_config=None)
    MyCallback(max_model_len=64).on_before_init(ctx)
    assert ctx.extra_init_kwargs == {"max_model_len": 64}


def test_my_callback_works_behind_one_that_brings_the_model(
    run_stack: RunStack, tmp_path: Path
) -> None:
    brings = TakeOver("on_before_download", tmp_path)
    outcome = run_stack([brings, MyCallback], nodes=2).assert_succeeded()
    assert [call.outcome for call in outcome.calls("MyCallback", "on_after_init")] == ["returned"]
    # It is marked to run first, also before one that ends the chain.
    assert all("free_bytes" in node.custom_data for node in outcome.nodes.values())


def test_what_the_manager_returns_for_a_name() -> None:
    settings = SimpleNamespace(
        callback_class="rayserve_hooks.HooksCallback",
        callback_kwargs={"callbacks": ["my_module.MyCallback"]},
        raise_error_on_callback=True,
    )
    config = SimpleNamespace(model_id="tiny", callback_config=settings)
    manager = get_plugin_manager(config)
    callback = manager.get_plugin("MyCallback")
    assert isinstance(callback, MyCallback)
    assert callback in manager.get_plugins()
    (impl,) = manager.hook.on_before_download.get_hookimpls()
    assert impl.plugin.callback is callback  # type: ignore[attr-defined]
    assert impl.plugin == callback
    assert manager.list_name_plugin() == [("MyCallback", callback)]


def test_checked_arguments_set_the_engine() -> None:
    (entry,) = parse_callbacks(
        {"callback": "engine_size:EngineSize", "kwargs": {"max_model_len": 64}}
    )
    callback = entry.create()
    assert isinstance(callback, EngineSize)
    ctx = CallbackCtx(llm_config=None)
    callback.on_before_init(ctx)
    assert ctx.extra_init_kwargs == {"max_model_len": 64, "dtype": "auto"}


def test_refused_arguments_are_what_the_page_shows() -> None:
    kwargs = {"max_model_len": 0, "dtyp": "auto"}
    shown = (EXAMPLES / "refused_arguments.txt").read_text().splitlines()
    with pytest.raises(CallbackConfigError) as caught:
        EngineSize(**kwargs)  # type: ignore[arg-type]
    assert list(caught.value.problems) == shown
    (entry,) = parse_callbacks({"callback": "engine_size:EngineSize", "kwargs": kwargs})
    with pytest.raises(CallbackConfigError) as caught:
        entry.create()
    assert all(line in str(caught.value) for line in shown)


def test_a_secret_is_read_from_its_file_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "another")
    (tmp_path / "token").write_text("hf_mounted\n")
    HubToken(str(tmp_path / "token")).on_before_download(CallbackCtx(llm_config=None))
    assert os.environ["HF_TOKEN"] == "hf_mounted"


@pytest.mark.parametrize("name", ["bring_files", "production"])
def test_a_list_of_callbacks_is_the_same_in_python_and_in_yaml(name: str) -> None:
    written = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())["callbacks"]
    assert written == json.loads(json.dumps(importlib.import_module(name).callbacks))
    setup = configparser.ConfigParser()
    setup.read(EXAMPLES.parent / "setup.cfg")
    lines = setup["options.entry_points"]["rayserve_hooks"].strip().splitlines()
    targets = dict(line.split(" = ") for line in lines)
    entries = [entry if isinstance(entry, dict) else {"callback": entry} for entry in written]
    for entry in parse_callbacks([{**e, "callback": targets[e["callback"]]} for e in entries]):
        assert entry.create()
