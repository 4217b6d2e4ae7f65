"""What the package says about itself, and what the checkout runs before a commit."""

from __future__ import annotations

import ast
import email
import email.message
import hashlib
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

import rayserve_hooks

ROOT = Path(__file__).parent.parent
OFFICIAL_TEXT = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> email.message.Message:
    """Return what an installer reads, made by the build backend from a copy of the sources."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "rayserve_hooks", folder / "rayserve_hooks")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    build = "from setuptools import build_meta as b; b.prepare_metadata_for_build_wheel('.')"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=folder, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.dist-info/METADATA")
    return email.message_from_string(made.read_text())


def test_the_metadata_names_version_author_and_licence(metadata: email.message.Message) -> None:
    assert metadata["Version"] == rayserve_hooks.__version__
    assert metadata["Author"] == "The rayserve_hooks authors"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert "pluggy" in metadata["Keywords"].split(",")
    assert metadata.get_payload() == (ROOT / "README.md").read_text()


def test_the_metadata_names_no_address(metadata: email.message.Message) -> None:
    names = {"Home-page", "Download-URL", "Project-URL", "Author-email", "Maintainer-email"}
    assert names.isdisjoint(metadata.keys())


def test_the_version_can_be_read_without_importing_the_package() -> None:
    body = ast.parse((ROOT / "rayserve_hooks" / "__init__.py").read_text()).body
    assert ast.unparse(body[1]) == f"__version__ = {rayserve_hooks.__version__!r}"


def test_the_licence_is_the_official_text_unchanged() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == OFFICIAL_TEXT


def test_pre_commit_runs_what_make_lint_runs_and_nothing_else() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repository,) = config["repos"]
    (hook,) = repository["hooks"]
    assert repository["repo"] == "local"
    assert (hook["language"], hook["entry"]) == ("system", "make lint")
    # mypy reads the whole tree, so a list of changed files would check something else.
    assert (hook["pass_filenames"], hook["always_run"]) == (False, True)


def test_a_warning_of_anybody_is_an_error_in_a_test_without_ray() -> None:
    with pytest.raises(DeprecationWarning, match="old"):
        warnings.warn_explicit("old", DeprecationWarning, "elsewhere.py", 1, module="elsewhere")
