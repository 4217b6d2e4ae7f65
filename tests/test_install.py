"""What the install says before it downloads anything.

pip and the machine's tools are stand-ins on PATH: a real install takes minutes, and .ci/run does
one on every run.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ("awk", "bash", "cut", "df", "du", "env", "find", "sed", "touch")


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


def install(tools: Path, *arguments: str, venv: Path | None = None) -> tuple[int, str]:
    environment = {"PATH": str(tools), "VENV": str(venv or tools.parent / "venv")}
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
    assert output.startswith("install: Python 3.11 is needed, 'python3' is ")


def test_another_python(tools: Path) -> None:
    write_tool(tools, "python3.11", '[ "$1" = --version ] && echo Python 3.9.2; exit 1')
    code, output = install(tools, "cpu")
    assert code == 1
    assert "Python 3.11 is needed, 'python3.11' is Python 3.9.2" in output


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
    assert "--editable .[engine-cpu,test,lint]" in real


def test_an_environment_with_the_other_engine_is_made_anew(tools: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    write_tool(tools, "python3.11", f'echo "$@" >> {calls}')
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    write_tool(python.parent, "python", "exit 0")
    assert install(tools, "cpu")[0] == 0
    assert "--clear" not in calls.read_text()
    (tmp_path / "venv" / "installed-vllm").touch()
    assert install(tools, "cpu")[0] == 0
    assert f"-m venv --clear {tmp_path / 'venv'}" in calls.read_text()


def test_make_installs_once_and_again_when_what_it_depends_on_has_changed(tmp_path: Path) -> None:
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv").mkdir()
    write_tool(tmp_path / "scripts", "install.sh", 'echo "installs for $1"')

    def make() -> str:
        command = ["make", "--no-print-directory", "install", "ENGINE=cpu"]
        done = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
        return done.stdout

    assert make() == "installs for cpu\n"
    assert "installs" not in make()
    for name in ("setup.cfg", "pyproject.toml", "scripts/install.sh"):
        later = (tmp_path / ".venv" / "installed-cpu").stat().st_mtime + 1
        os.utime(tmp_path / name, (later, later))
        assert make() == "installs for cpu\n", name
        os.utime(tmp_path / name, (0, 0))
