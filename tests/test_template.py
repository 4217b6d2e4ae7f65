"""The template of a package with a callback: built, installed, tested, found and served."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TEMPLATE = ROOT / "examples" / "model_from_share"
NAME = "model_from_share"


def run(python: Path, *arguments: str, folder: Path) -> str:
    """Run a command of the new environment, without what this process adds to its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-m", *arguments],
        check=False,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the template: its build leaves files."""
    folder = tmp_path_factory.mktemp("template") / NAME
    shutil.copytree(TEMPLATE, folder, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
    return folder


@pytest.fixture(scope="module")
def python(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of a fresh environment in which the template's wheel is installed.

    It sees this environment's packages, and this checkout's, as installed.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/*/site-packages")
    (site / "here.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    offline = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    pip, dist, new = (sys.executable, "-m", "pip"), source / "dist", folder / "bin" / "python"
    build = (*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(dist))
    subprocess.run([*build, str(source)], check=True)
    (wheel,) = dist.glob("*.whl")
    subprocess.run([*pip, "--python", str(new), "install", *offline, str(wheel)], check=True)
    assert (site / NAME / "py.typed").exists()
    return new


@pytest.mark.slow
def test_its_tests_pass_where_it_is_installed(python: Path, source: Path) -> None:
    shutil.move(source / NAME, source / "not_here")  # what is tested is what is installed
    try:
        said = run(python, "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", folder=source)
    finally:
        shutil.move(source / "not_here", source / NAME)
    assert "5 passed" in said


@pytest.mark.slow
def test_the_command_line_finds_it(python: Path, source: Path) -> None:
    plugins = json.loads(run(python, "rayserve_hooks", "plugins", "--json", folder=source.parent))
    (found,) = (plugin for plugin in plugins if plugin["name"] == NAME)
    assert found["distribution"] == "model_from_share 0.1"
    assert found["hooks"] == ["on_before_init", "on_before_download"]
    order = run(python, "rayserve_hooks", "order", "serve_config.yaml", folder=source)
    assert NAME in order


@pytest.mark.slow
def test_it_has_types(python: Path, source: Path) -> None:
    run(python, "mypy", "--strict", "--cache-dir", str(source / ".mypy"), folder=source)


SERVE = """
import json, sys
import ray, requests
from ray import serve
from rayserve_hooks import LLMConfig, build_openai_app

ray.init(address="local", num_cpus=4, include_dashboard=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
config = LLMConfig(
    model_loading_config={"model_id": "tiny", "model_source": "nobody/has-this"},
    callbacks=[{"callback": "model_from_share", "kwargs": {"folder": sys.argv[1]}}],
    placement_group_config={"bundles": [{"CPU": 1}]},
    engine_kwargs={"max_model_len": 512, "enforce_eager": True, "max_num_seqs": 4},
    log_engine_metrics=False,
    runtime_env={"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1"}},
)
serve.run(build_openai_app({"llm_configs": [config]}))
body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
url = f"http://127.0.0.1:{sys.argv[2]}/v1/chat/completions"
print(requests.post(url, json=body, timeout=120).status_code)
ray.shutdown()
"""


@pytest.mark.engine
@pytest.mark.timeout(400)
def test_it_serves_the_model_of_the_share(
    python: Path, source: Path, tiny_model: Path, tmp_path: Path
) -> None:
    import processes

    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "tiny").symlink_to(tiny_model)
    script = source.parent / "serve_it.py"
    script.write_text(SERVE)
    port = str(processes.free_port())
    with processes.none_left():
        said = run(python, "serve_it", str(tmp_path / "share"), port, folder=source.parent)
    assert said.splitlines()[-1] == "200"


def test_its_config_is_one_of_ours() -> None:
    config = yaml.safe_load((TEMPLATE / "serve_config.yaml").read_text())
    (application,) = config["applications"]
    assert application["import_path"] == "rayserve_hooks:build_openai_app"
    (llm_config,) = application["args"]["llm_configs"]
    assert [entry["callback"] for entry in llm_config["callbacks"]] == [NAME]
