"""The command line, in this process, and once as a user calls it."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import yaml
from cli_callbacks import First
from plugins_for_tests import parse_callbacks

import rayserve_hooks
from rayserve_hooks import CallbackCtx, RayServeLLMCallback
from rayserve_hooks.cli import main
from rayserve_hooks.core.loading import short_names

ROOT = Path(__file__).parent.parent
OURS = "rayserve_hooks.HooksCallback"
BUILDER = "ray.serve.llm:build_openai_app"
CONFIGS = "applications: [{args: {llm_configs:"
EXAMPLE = str(ROOT / "examples" / "serve_config.yaml")
DISTRIBUTION = f"rayserve_hooks {importlib.metadata.version('rayserve_hooks')}"


@pytest.fixture(autouse=True)
def _path_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a distribution with an entry point, before all others on sys.path."""

    def write(name: str, line: str) -> None:
        info = tmp_path / name / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        text = f"[rayserve_hooks]\n{line}\n".encode("utf-8", "surrogateescape")
        (info / "entry_points.txt").write_bytes(text)
        monkeypatch.syspath_prepend(tmp_path / name)
        short_names.cache_clear()

    yield write
    monkeypatch.undo()
    short_names.cache_clear()


def write_config(folder: Path, *deployments: list[Any], **kwargs: Any) -> str:
    """Write a Serve config; ``kwargs`` are added to each deployment's ``callback_kwargs``."""
    llm_configs = [
        {
            "model_loading_config": {"model_id": f"m{index}"},
            "callback_config": {
                "callback_class": "rayserve_hooks.HooksCallback",
                "callback_kwargs": {"callbacks": callbacks, **kwargs},
            },
        }
        for index, callbacks in enumerate(deployments)
    ]
    path = folder / "serve_config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "applications": [
                    {"name": "app", "import_path": BUILDER, "args": {"llm_configs": llm_configs}}
                ]
            }
        )
    )
    return str(path)


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main([*arguments, "--json"]) == 0
    loaded: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return loaded


def test_order_of_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "order", EXAMPLE)
    assert [(row["hook"], row["position"], row["callback"], row["options"]) for row in found] == [
        ("on_before_init", 1, "startup_metrics", ["wrapper", "tryfirst"]),
        ("on_before_init", 2, "MyCallback", ["tryfirst"]),
        ("on_before_download", 1, "MyCallback", ["tryfirst", "async"]),
        ("on_after_init", 1, "startup_metrics", ["wrapper", "tryfirst"]),
        ("on_after_init", 2, "MyCallback", ["trylast"]),
        ("on_engine_ready", 1, "startup_metrics", ["wrapper", "tryfirst"]),
        ("on_init_failed", 1, "startup_metrics", []),
    ]
    assert {row["hook"]: row["result"] for row in found} == {
        "on_before_init": "first wins",
        "on_before_download": "first wins",
        "on_after_init": "all run",
        "on_engine_ready": "all run",
        "on_init_failed": "all run",
    }
    assert {row["deployment"] for row in found} == {"tiny/tiny"}
    assert found[0]["distribution"] == DISTRIBUTION
    file, _, line = found[1]["source"].rpartition(":")
    lines = Path(file).read_text().splitlines()
    assert "def on_before_init" in "".join(lines[int(line) - 1 : int(line) + 1])


def test_order_says_where_each_hook_runs_and_what_the_builder_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kwargs = {"name": "x", "log": "/x"}
    entry = {"callback": "life_callbacks:LifeOfAll", "kwargs": kwargs}
    path = tmp_path / "serve.yaml"
    model = {"model_loading_config": {"model_id": "m"}, "callbacks": [entry]}
    ours = {"import_path": "rayserve_hooks:build_openai_app", "args": {"llm_configs": [model]}}
    path.write_text(yaml.safe_dump({"applications": [ours]}))
    assert {row["hook"]: row["where"] for row in rows(capsys, "order", str(path))} == {
        "on_configure": "where the app is built",
        "on_before_init": "the replica",
        "on_before_download": "every node of the replica",
        "on_after_init": "the replica",
        "on_before_engine_init": "every process of the engine",
        "on_engine_ready": "the replica",
        "on_shutdown": "the replica",
        "on_init_failed": "each node that had started, then the replica",
    }
    advice = "; build the app with rayserve_hooks:build_openai_app, or its other forms"
    found = rows(capsys, "order", write_config(tmp_path, [entry]))
    where = {row["hook"]: row["where"].removesuffix(advice) for row in found}
    assert where == {
        "on_configure": "not run by Ray's builder",
        "on_before_init": "the replica",
        "on_before_download": "every node of the replica",
        "on_after_init": "the replica",
        "on_before_engine_init": "every process of the engine, unchecked",
        "on_engine_ready": "not run by Ray's engine",
        "on_shutdown": "not run by Ray's engine",
        "on_init_failed": "each node that had started, then the replica, but not once the nodes "
        "are ready",
    }


def test_order_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["order", EXAMPLE]) == 0
    header, _, first, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "deployment",
        "hook",
        "result",
        "position",
        "callback",
        "options",
        "distribution",
        "source",
        "where",
    ]
    assert first.split()[:8] == [
        "tiny/tiny",
        "on_before_init",
        "first",
        "wins",
        "1",
        "startup_metrics",
        "wrapper",
        "tryfirst",
    ]


def test_problems_of_all_deployments_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, ["no_such.X"], ["startup_metrics"], [{"callbak": "x"}])
    assert main(["order", path]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("rayserve-hooks: 2 problems:\n- app/m")
    assert "- app/m0: callback 'no_such.X': no module" in captured.err
    assert "- app/m2: callbacks[0] has unknown key 'callbak'; did you mean" in captured.err


def test_the_callbacks_of_a_clean_up_are_listed_in_reverse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows(
        capsys, "order", write_config(tmp_path, ["cli_callbacks:First", "cli_callbacks:Second"])
    )
    assert [(row["hook"], row["position"], row["callback"]) for row in found] == [
        ("on_before_init", 1, "First"),
        ("on_before_init", 2, "Second"),
        ("on_init_failed", 1, "Second"),
        ("on_init_failed", 2, "First"),
    ]


def test_a_callback_that_is_only_on_the_cluster_is_listed_without_its_hooks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = {"callback": "only_there:Fetch", "only_on_cluster": True, "on_error": "warn"}
    found = rows(capsys, "order", write_config(tmp_path, ["cli_callbacks:First", absent]))
    assert [row["callback"] for row in found] == ["First", "First", "Fetch"]
    assert found[2] == {
        "deployment": "app/m0",
        "hook": "?",
        "result": "",
        "position": 2,
        "callback": "Fetch",
        "options": ["only_on_cluster"],
        "distribution": "",
        "source": "only_there:Fetch",
        "where": "",
    }


@pytest.mark.parametrize("whole", [True, False])
def test_a_callback_whose_failure_is_only_logged_says_so(
    whole: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback: Any = "cli_callbacks:First"
    path = write_config(
        tmp_path, [callback if whole else {"callback": callback, "on_error": "warn"}]
    )
    if whole:
        config = yaml.safe_load(Path(path).read_text())
        (llm_config,) = config["applications"][0]["args"]["llm_configs"]
        llm_config["callback_config"]["raise_error_on_callback"] = False
        Path(path).write_text(yaml.safe_dump(config))
    assert [row["options"] for row in rows(capsys, "order", path)] == [["on_error=warn"]] * 2


def test_limits_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = {"downlod": 60, "total": 0}
    assert main(["order", write_config(tmp_path, [], time_limits=limits)]) == 1
    assert capsys.readouterr().err == (
        "rayserve-hooks: 2 problems:\n"
        "- app/m0: time_limits: total is 0; write seconds, more than 0, or null for no limit\n"
        "- app/m0: time_limits has unknown key 'downlod'; did you mean 'download'?\n"
    )


def write_llm_config(folder: Path, llm_config: dict[str, Any]) -> str:
    llm_config = {"model_loading_config": {"model_id": "m"}, **llm_config}
    path = folder / "serve_config.yaml"
    path.write_text(
        yaml.safe_dump(
            {"applications": [{"import_path": BUILDER, "args": {"llm_configs": [llm_config]}}]}
        )
    )
    return str(path)


def test_a_config_in_a_file_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm_config = tmp_path / "llm_config.yaml"
    kwargs = {"callback_kwargs": {"callbacks": ["cli_callbacks:First"]}}
    llm_config.write_text(
        yaml.safe_dump(
            {
                "model_loading_config": {"model_id": "m"},
                "callback_config": {"callback_class": "rayserve_hooks.HooksCallback", **kwargs},
            }
        )
    )
    path = tmp_path / "serve_config.yaml"
    args = {"llm_configs": [str(llm_config)]}
    path.write_text(yaml.safe_dump({"applications": [{"import_path": BUILDER, "args": args}]}))
    assert {row["deployment"] for row in rows(capsys, "order", str(path))} == {"default/m"}


@pytest.mark.parametrize("in_a_file", [False, True])
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("", {"llm_configs": "app/m"}),
        ("dp_", {"llm_config": "app/m"}),
        ("pd_", {"prefill_config": "app/Prefill:m", "decode_config": "app/Decode:m"}),
    ],
)
def test_order_reads_a_config_of_every_shape(
    kind: str,
    names: dict[str, str],
    in_a_file: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    llm_config: Any = {
        "model_loading_config": {"model_id": "m"},
        "engine_kwargs": {"kv_transfer_config": {}},
        "callback_config": {
            "callback_class": OURS,
            "callback_kwargs": {"callbacks": ["download_policy"]},
        },
    }
    if in_a_file:
        file = tmp_path / "llm_config.yaml"
        file.write_text(yaml.safe_dump(llm_config))
        llm_config = str(file)
    args = {name: [llm_config] if name.endswith("s") else llm_config for name in names}
    builder = f"ray.serve.llm:build_{kind}openai_app"
    path = tmp_path / "serve_config.yaml"
    application = {"name": "app", "import_path": builder, "args": args}
    path.write_text(yaml.safe_dump({"applications": [application]}))
    assert {(row["deployment"], row["callback"]) for row in rows(capsys, "order", str(path))} == {
        (name, "download_policy") for name in names.values()
    }


@pytest.mark.slow  # it imports Ray
def test_a_ray_callback_instead_of_ours_is_a_list_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"callback_class": "ray_callbacks:Strict"}
    path = write_llm_config(tmp_path, {"callback_config": settings})
    found = rows(capsys, "order", path)
    assert [(row["hook"], row["callback"]) for row in found] == [
        ("on_before_init", "Strict"),
        ("on_before_download", "Strict"),
        ("on_after_init", "Strict"),
    ]


@pytest.mark.slow  # it imports Ray
def test_a_ray_callback_is_shown_with_its_own_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows(capsys, "order", write_config(tmp_path, ["ray_callbacks:Everything"]))
    for row in found:
        file, _, line = row["source"].rpartition(":")
        assert Path(file).name == "ray_callbacks.py"
        method = Path(file).read_text().splitlines()[int(line) - 1]
        assert row["hook"].removesuffix("_init").removesuffix("_download") in method
    assert [row["options"] for row in found] == [["async"], [], ["async"]]


@pytest.mark.slow  # it imports Ray
def test_a_wrong_argument_of_a_ray_callback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"callback_class": "ray_callbacks:Strict", "callback_kwargs": {"pahts": []}}
    assert main(["order", write_llm_config(tmp_path, {"callback_config": settings})]) == 1
    assert capsys.readouterr().err == (
        "rayserve-hooks: default/m: callback 'Strict': ray_callbacks.Strict(llm_config: 'Any', "
        "raise_error_on_callback: 'bool', ctx_kwargs: 'Any') refused kwargs ['pahts']: TypeError: "
        "got an unexpected keyword argument 'pahts'; drop it\n"
    )


def test_a_secret_among_kwargs_reaches_no_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kwargs = {"hf_token": "s3cret"}
    refused = {"callback": "cli_callbacks:Refuses", "kwargs": kwargs}
    assert main(["order", write_config(tmp_path, [refused])]) == 1
    captured = capsys.readouterr()
    assert "ValueError: cannot use ***" in captured.err
    assert "s3cret" not in captured.out + captured.err


def test_a_switched_off_callback_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, ["startup_metrics", "download_policy"])
    monkeypatch.setenv("RAYSERVE_HOOKS_DISABLE", "startup_metrics")
    assert {row["callback"] for row in rows(capsys, "order", path)} == {"download_policy"}


def test_one_that_the_file_switches_off_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(write_config(tmp_path, ["startup_metrics", "download_policy"]))
    config = yaml.safe_load(path.read_text())
    variables = {"RAYSERVE_HOOKS_DISABLE": "startup_metrics"}
    config["applications"][0]["runtime_env"] = {"env_vars": variables}
    path.write_text(yaml.safe_dump(config))
    assert {row["callback"] for row in rows(capsys, "order", str(path))} == {"download_policy"}


def test_without_a_command_the_help_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "list the callbacks with a short name" in capsys.readouterr().err


def test_a_config_without_callbacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["order", write_config(tmp_path, [])]) == 0
    assert capsys.readouterr().out == "no callbacks\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "holds no mapping; name a Serve config file"),
        ("a: 1", "has no list 'applications'; name a Serve config file"),
        ("a: [", "cannot read"),
        ("applications: [x]", "applications holds 'x', no mapping; write one for each"),
        (
            "applications: [{args: 3}]",
            "default: args is 3; write a mapping",
        ),
        (
            "applications: [{args: [a]}]",
            "default: args is ['a']; write a mapping",
        ),
        (
            "applications: [{args: {llm_configs: 3}}]",
            "llm_configs is 3; write a list",
        ),
        (
            "applications: [{args: {llm_configs: x.yaml}}]",
            "llm_configs is 'x.yaml'; write a list",
        ),
        (
            "applications: [{args: {llm_configs: [3]}}]",
            "default: llm_configs[0] is 3; write a map",
        ),
        (
            "applications: [{args: {llm_configs: [no.yaml]}}]",
            "cannot read 'no.yaml': [Errno 2]",
        ),
        (
            f"{CONFIGS} [{{model_loading_config: 3}}]}}}}]",
            "model_loading_config is 3; write a mapping",
        ),
        (
            f"{CONFIGS} [{{callback_config: [3]}}]}}}}]",
            "default/?: callback_config is [3]; write a map",
        ),
        (
            f"{CONFIGS} [{{callback_config: {{callback_class: 3}}}}]}}}}]",
            "callback_class is 3; write",
        ),
        (
            f"{CONFIGS} [{{callback_config: {{callback_kwargs: [3]}}}}]}}}}]",
            "callback_kwargs is [3]; w",
        ),
        (
            (
                f"{CONFIGS} [{{callback_config: {{callback_class: {OURS}, callback_kwargs: "
                "{1: a, b: c}}}]}}]"
            ),
            "- default/?: callback_kwargs has unknown key 'b'; HooksCallback takes",
        ),
        (
            (
                f"{CONFIGS} [{{callback_config: {{callback_class: 'json:X', callback_kwargs: "
                "{1: 2}}}]}}]"
            ),
            "default/?: callback 'X': kwargs is no mapping with strings as keys; write one of",
        ),
        ("a: 2020-99-99", "cannot read"),
        ("a: &a [*a]", "has no list 'applications'; name a Serve config file"),
        ("applications: &a [*a]", "applications holds [[[[[[[[[...]]]]]]]]], no mapping; write"),
        ("[" * 1500, "cannot read"),
        ('a: "\\ud800"\napplications: ["\\ud800"]', "applications holds '\\ud800', no map"),
    ],
)
def test_no_serve_config(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text.replace("[{args", f"[{{import_path: '{BUILDER}', args"))
    assert main(["order", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_an_installed_callback_that_cannot_be_imported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry_point = importlib.metadata.EntryPoint("fetch", "no_such_module:Fetch", "rayserve_hooks")
    exits = importlib.metadata.EntryPoint("exits", "cli_exits:Fetch", "rayserve_hooks")
    monkeypatch.setitem(sys.modules, "cli_exits", ExitsWhenRead("cli_exits"))
    one = importlib.metadata.EntryPoint("one", f"{__name__}:OneHook", "rayserve_hooks")
    monkeypatch.setattr(
        "rayserve_hooks.cli.listing.installed",
        lambda: {"one": [one], "fetch": [entry_point], "exits": [exits]},
    )
    broken_by_exit, broken, whole = rows(capsys, "plugins")
    assert broken == {
        "name": "fetch",
        "callback": "no_such_module:Fetch",
        "hooks": [],
        "distribution": "",
        "source": "?",
        "note": "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
    }
    assert broken_by_exit["note"] == "cannot be imported: SystemExit: 3"
    assert (whole["hooks"], whole["note"]) == (["on_after_init"], "")


class ExitsWhenRead(ModuleType):
    def __getattr__(self, name: str) -> object:
        raise SystemExit(3)


def test_a_broken_distribution_is_named(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install("fetchers", "fetch = no_such_module:Fetch")
    found = {row["name"]: row for row in rows(capsys, "plugins")}
    assert found["fetch"]["distribution"] == "fetchers 1.0"
    assert "startup_metrics" in found
    assert main(["plugins"]) == 0
    assert "No module named 'no_such_module'" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["no equals sign", "name = a:B\n\udcff"])
def test_a_distribution_that_cannot_be_read_hides_no_other(
    line: str, install: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    install("whole", "first = cli_callbacks:First")
    install("broken", line)
    *_, last = found = rows(capsys, "plugins")
    assert {"first", "startup_metrics"} <= {row["name"] for row in found}
    assert (last["name"], last["distribution"]) == ("?", "broken 1.0")
    assert last["note"].startswith("its entry points cannot be read: ")
    assert type(parse_callbacks(["first"])[0].create()) is First


def test_a_note_is_a_line_without_secrets(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    install("refuses", "refuses = cli_refuses:Fetch")
    text = "print('said'); raise ValueError('password=s3cr3t-value\\n' + 'a\\n' * 9000)"
    (tmp_path / "refuses" / "cli_refuses.py").write_text(text)
    (row,) = (row for row in rows(capsys, "plugins") if row["name"] == "refuses")
    assert row["note"].startswith("cannot be imported: ValueError: password=*** a a")
    assert len(row["note"]) < 400


def test_an_installed_object_that_is_no_callback_says_so(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    install("odd", "odd = cli_odd:found")
    text = "class Odd:\n    def __getattribute__(self, name): raise OSError(name)\nfound = Odd()"
    (tmp_path / "odd" / "cli_odd.py").write_text(text)
    (row,) = (row for row in rows(capsys, "plugins") if row["name"] == "odd")
    assert (row["source"], row["note"]) == ("?", "has no hook, so it is no callback")


def test_two_distributions_with_one_short_name_are_both_listed(
    install: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    install("later", "same = cli_callbacks:Second")
    install("earlier", "same = cli_callbacks:First")
    found = [row for row in rows(capsys, "plugins") if row["name"] == "same"]
    assert [(row["callback"], row["note"]) for row in found] == [
        ("cli_callbacks:First", "is the one that 'same' means: it is earlier on sys.path"),
        (
            "cli_callbacks:Second",
            "hidden by that of earlier 1.0, which is earlier on sys.path",
        ),
    ]
    order = rows(capsys, "order", write_config(tmp_path, ["same"]))
    assert {Path(row["source"].partition(":")[0]).name for row in order} == {"cli_callbacks.py"}
    assert type(parse_callbacks(["same"])[0].create()) is First


def test_a_file_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    for named in (str(path), str(tmp_path), "a\0b"):
        assert main(["order", named]) == 1
        assert capsys.readouterr().err.startswith("rayserve-hooks: cannot read ")


def some_yaml(random: Random, depth: int = 0) -> Any:
    """Return what a YAML file may hold, often nearly a Serve config."""
    keys = ["applications", "args", "llm_configs", "callback_config", "callback_kwargs", "name"]
    keys += ["llm_config", "prefill_config", "decode_config", "import_path", "lora_config"]
    keys += ["placement_group_config", "bundles", "engine_kwargs", "deployment_config"]
    keys += ["callbacks", "time_limits", "callback", "kwargs", "model_loading_config", "model_id"]
    words: list[Any] = [*("startup_metrics", "cli_callbacks:First", "cli_exits:X", "json", ":", "")]
    words += [None, True, 0, -1.5, b"x", 10**40, date(2020, 1, 1), "rayserve_hooks.HooksCallback"]
    words += [f"ray.serve.llm:build_{kind}openai_app" for kind in ("", "dp_", "pd_")]
    size = range(random.randrange(4))
    kind = random.random() + depth * 0.1
    if kind < 0.15:
        return [some_yaml(random, depth + 1) for _ in size]
    if depth < len(NESTED) and kind < 0.9:
        rest = {random.choice([*keys, 1, None]): some_yaml(random, depth + 2) for _ in size}
        inner = some_yaml(random, depth + 1)
        return {**rest, NESTED[depth]: [inner] if random.random() < 0.5 else inner}
    if kind < 0.8:
        return {random.choice(keys): some_yaml(random, depth + 1) for _ in size}
    return random.choice(words)


def nearly_right(random: Random) -> Any:
    """Return a config of one of the builders, in which one place may hold anything."""
    settings = {"callback_class": OURS, "callback_kwargs": {"callbacks": ["startup_metrics"]}}
    llm_config = {
        "model_loading_config": {"model_id": "m"},
        "callback_config": settings,
        "engine_kwargs": {"kv_transfer_config": {}},
        "placement_group_config": {"bundles": [{"CPU": 1}]},
    }
    args: dict[str, Any] = random.choice(
        [
            {"llm_configs": [llm_config]},
            {"llm_config": llm_config},
            {"prefill_config": llm_config, "decode_config": llm_config},
        ]
    )
    kind = {"llm_configs": "", "llm_config": "dp_", "prefill_config": "pd_"}[next(iter(args))]
    import_path = random.choice([f"ray.serve.llm:build_{kind}openai_app", "my_app:build"])
    whole = {"applications": [{"import_path": import_path, "args": args}]}
    place: Any = copy.deepcopy(whole)
    whole = place
    while random.random() < 0.8 and place:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = random.choice(keys)
        if random.random() < 0.2:
            place[key] = some_yaml(random, 3)
        if not isinstance(place[key], dict | list):
            break
        place = place[key]
    return whole


NESTED = ("applications", "args", "llm_configs", "callback_config", "callback_kwargs", "callbacks")


@pytest.mark.slow
def test_any_yaml_ends_in_a_table_or_in_the_documented_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cli_exits", ExitsWhenRead("cli_exits"))
    random, until = Random(12), time.monotonic() + 5
    path = tmp_path / "x.yaml"
    codes = set()
    for number in range(600):
        text = yaml.dump(nearly_right(random) if number % 3 else some_yaml(random))
        if number % 4 == 0:  # cut somewhere, or one character is another
            place = random.randrange(len(text) + 1)
            text = text[:place] + random.choice(["", ":", "[", "\t", "&a *a", "\0"])
        path.write_text(text)
        options = ["--import-only"] if number % 2 else []
        code = main(["order", str(path), *options])
        captured = capsys.readouterr()
        assert (code, captured.err[:16]) in [(0, ""), (1, "rayserve-hooks: ")], text
        codes.add(code)
        if time.monotonic() > until:
            return
    assert codes == {0, 1}


def test_a_class_without_a_hook_is_never_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = tmp_path / "ran"
    kwargs = {"args": f"touch {ran}", "shell": True}
    path = write_config(tmp_path, [{"callback": "subprocess:Popen", "kwargs": kwargs}])
    assert main(["order", path]) == 1
    assert "callback 'Popen': Popen has no hook; define" in capsys.readouterr().err
    assert not ran.exists()


def test_import_only_builds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuses = {"callback": "cli_callbacks:Refuses", "kwargs": {"hf_token": "s3cret"}}
    path = write_config(tmp_path, [refuses, "cli_callbacks:First"])
    assert main(["order", path]) == 1
    capsys.readouterr()
    found = rows(capsys, "order", path, "--import-only")
    assert [(row["hook"], row["callback"]) for row in found] == [
        ("on_before_init", "Refuses"),
        ("on_before_init", "First"),
        ("on_init_failed", "First"),
        ("on_init_failed", "Refuses"),
    ]
    assert "cli_callbacks.py:" in found[0]["source"]


@pytest.mark.parametrize("command", ["order", "plugins"])
def test_help_says_that_code_of_others_runs(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "runs code of theirs" in text
    if command == "order":
        assert "imported and built, which runs code of theirs: use it for files that you" in text


def test_a_module_that_is_not_found_mentions_the_folder_and_where_here_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, ["my_callbacks:Fetch"])
    assert main(["order", path, "--app-dir", str(tmp_path)]) == 1
    text = capsys.readouterr().err
    assert f"here is host {socket.gethostname()!r} with {str(tmp_path)!r}, " in text
    assert text.endswith("; --app-dir names the folder to import callbacks from\n")


def test_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"rayserve-hooks {rayserve_hooks.__version__}\n"


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "rayserve_hooks", "plugins", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert "startup_metrics" in {row["name"] for row in json.loads(done.stdout)}


def test_a_reader_that_closes_the_output_gets_no_traceback() -> None:
    # Python ignores SIGPIPE, so that its write fails, as it does in front of 'head'.
    done = subprocess.run(
        [
            "bash",
            "-c",
            f"{sys.executable} -m rayserve_hooks schema | true; echo ${{PIPESTATUS[0]}}",
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.stdout in ("141\n", "0\n")


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["order", "no_such.yaml"]) == 1
    assert capsys.readouterr().err.startswith(
        "rayserve-hooks: cannot read 'no_such.yaml': [Errno 2] No such file or directory"
    )


def test_plugins_lists_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    found = {row["name"]: row for row in rows(capsys, "plugins")}
    assert found["download_policy"]["hooks"] == ["on_before_init", "on_before_download"]
    assert found["startup_metrics"]["distribution"] == DISTRIBUTION
    assert {"custom_initialization", "custom_placement_group"} <= set(found)


def test_as_a_command_it_imports_no_ray() -> None:
    code = (
        "import sys; from rayserve_hooks.cli import main; main(sys.argv[1:]); "
        "sys.exit('ray' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "order", EXAMPLE, "--app-dir", str(ROOT / "examples")]
    assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0
    script = Path(sys.executable).with_name("rayserve-hooks")
    assert (
        subprocess.run([script, "plugins"], check=False, stdout=subprocess.DEVNULL).returncode == 0
    )


class OneHook(RayServeLLMCallback):
    def on_after_init(self, ctx: CallbackCtx) -> None: ...


def test_plugins_lists_only_the_hooks_that_a_subclass_defines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry_point = importlib.metadata.EntryPoint("one", f"{__name__}:OneHook", "rayserve_hooks")
    monkeypatch.setattr("rayserve_hooks.cli.listing.installed", lambda: {"one": [entry_point]})
    (row,) = rows(capsys, "plugins")
    assert row["hooks"] == ["on_after_init"]
