"""The demo, interrupted; tests/test_commands.py runs it to its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import processes
import psutil
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

ROOT = Path(__file__).parent.parent
DEMO = [sys.executable, str(ROOT / "examples" / "demo.py")]


# A terminal sends Ctrl-C to the whole foreground group; make hands SIGTERM on to its child.
@pytest.mark.parametrize(
    ("send", "signal_number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)]
)
def test_interrupted_it_leaves_no_process(
    send: Callable[[int, int], None], signal_number: signal.Signals
) -> None:
    mark = uuid.uuid4().hex
    environment = {**os.environ, "DEMO_TEST": mark, "PYTHONUNBUFFERED": "1"}
    demo = subprocess.Popen(
        DEMO, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert demo.stdout is not None
    try:
        for line in demo.stdout:
            if line.startswith("... serving the model with the callbacks stacked"):
                break
        send(demo.pid, signal_number)
        demo.stdout.read()
        assert demo.wait(timeout=60) == 128 + signal_number
        assert processes.marked("DEMO_TEST", mark) == []
    finally:
        left = processes.marked("DEMO_TEST", mark)
        for process in left:
            process.kill()
        psutil.wait_procs(left)
