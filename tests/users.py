"""Children of a test that are other users of the machine, which only root can start."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ALICE, BOB = 4201, 4202
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")


def start_as(user: int, script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python script that is the user from where it calls ``become()``.

    Its imports come before that call: the user may have no right to read the interpreter's files.
    """
    become = f"""
import os
def become():
    os.setgroups([])
    os.setgid({user})
    os.setuid({user})
"""
    return subprocess.Popen(
        [sys.executable, "-c", become + script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_as(user: int, script: str, *arguments: object) -> str:
    """Return what the script prints; its last line on stderr, if it fails."""
    out, error = start_as(user, script, *arguments).communicate(timeout=60)
    return out or error.strip().rpartition("\n")[2]


@contextlib.contextmanager
def common_folder() -> Iterator[Path]:
    """Yield a folder that all users may write, as the one for temporary files; pytest's is ours."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o1777)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
