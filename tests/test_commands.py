"""Each command of the documentation is run as it is written, one shell for each page, in a clone.

The clone's ``.venv`` sees the packages of the environment that the tests run in. So the commands
that install find everything there, and only what belongs to the clone is new.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import processes
import psutil
import pytest
import requests
from waiting import until

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
NOT_RUN = {
    ".venv/bin/ray stop": "it would end the clusters of other tests, too",
    "make bench": "an hour of an idle machine, or its ratios are not true",
    "make test": "this is a part of it; .ci/run ends with it",
    "pip install '.[engine]'": "CUDA packages of 10 GB; 'ray[llm]' pins them",
}
SERVES = {".venv/bin/serve run examples/serve_config.yaml"}
# These start Ray, and leave no process.
ENDS_ALL = {"make demo", ".venv/bin/python examples/quick_start.py"}
# A page that comes after another one, which has installed.
BEFORE = {
    "callbacks.md": ["make install"],
    "command_line.md": ["make install"],
    "migration.md": ["pip install '.[testing]'"],
}
SAYS = {
    "make demo": (
        "startup_metrics, startup_timeline, MyCallback, custom_placement_group, download_policy",
        *(
            f"\N{CHECK MARK} {title}: "
            for title in (
                "my own callback",
                "download policy",
                "start-up metrics",
                "start-up timeline",
                "custom placement group",
                "full custom initialization",
            )
        ),
        "all checks passed; no process is left",
    ),
    ".venv/bin/rayserve-hooks order examples/serve_config.yaml --app-dir examples": ("MyCallback",),
    "rayserve-hooks order examples/first_callback.yaml --app-dir examples": ("the replica",),
    "rayserve-hooks plugins": ("model_from_share:ModelFromShare",),
    "rayserve-hooks check serve_config.yaml": ("llm/tiny: model_from_share",),
    "rayserve-hooks check examples/migrated.yaml --app-dir examples": ("llm/tiny: Stock",),
    ".venv/bin/python examples/quick_start.py": (
        "on_before_init ['startup_metrics', 'MyCallback']",
    ),
    # Ray logs what a YAML file gives to callbacks, as docs/callbacks.md says.
    ".venv/bin/serve run examples/serve_config.yaml": ("'kwargs': {'max_model_len': 192}",),
}


def commands_of(page: Path) -> list[str]:
    lines = "".join(BLOCK.findall(page.read_text())).splitlines()
    assert all(line.startswith("$ ") for line in lines), lines
    return [line.removeprefix("$ ") for line in lines]


PAGES = [page for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")] if commands_of(page)]
COMMANDS = {command for page in PAGES for command in commands_of(page)}


def clone(folder: Path) -> None:
    """Clone the repository, with what is not committed yet."""
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    changed = subprocess.run(
        ["git", "ls-files", "--modified", "--others", "--exclude-standard", "-z"],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    for name in filter(None, changed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
        else:
            (folder / name).unlink()


def make_venv(folder: Path) -> None:
    """Make an environment that sees the packages of this one, and has its commands."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (site,) = folder.glob("lib/*/site-packages")
    (site / "of_the_tests.pth").write_text(sysconfig.get_path("purelib"))
    own = f"#!{sys.executable}\n".encode()
    for script in Path(sysconfig.get_path("scripts")).iterdir():
        target = folder / "bin" / script.name
        if target.exists() or script.is_dir():
            continue
        content = script.read_bytes()
        if content.startswith(own):
            target.write_bytes(content.replace(own, f"#!{folder}/bin/python\n".encode(), 1))
            target.chmod(0o755)
        else:
            target.symlink_to(script)


class Shell:
    """One bash, which is given one line after the other."""

    def __init__(self, folder: Path, environment: dict[str, str], output: Path) -> None:
        lines, self._lines = os.pipe()
        self._codes, codes = os.pipe()
        loop = (
            f'while IFS= read -r -u {lines} line; do eval "$line" {lines}<&- {codes}>&-; '
            f"echo $? >&{codes}; done"
        )
        self.output, self.ray_folder = output, environment["RAY_TMPDIR"]
        with output.open("w") as file:
            self.process = subprocess.Popen(
                ["bash", "-c", loop],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=(lines, codes),
            )
        os.close(lines)
        os.close(codes)

    def start(self, line: str) -> None:
        os.write(self._lines, f"{line}\n".encode())

    def code(self) -> int:
        """Wait for the end of a command."""
        text = b""
        while not text.endswith(b"\n"):
            more = os.read(self._codes, 16)
            assert more, self.output.read_text()
            text += more
        return int(text)

    def interrupt(self) -> None:
        """Do what Ctrl-C does to a command, but not to what Ray has started for it."""
        (command,) = psutil.Process(self.process.pid).children()
        command.send_signal(signal.SIGINT)

    def close(self) -> None:
        os.close(self._lines)
        os.close(self._codes)
        self.process.wait()


@contextlib.contextmanager
def shell_in_a_clone(folder: Path) -> Iterator[Shell]:
    clone(folder)
    make_venv(folder / ".venv")
    installed = next((path.name for path in Path(sys.prefix).glob("installed-*")), "")
    as_here = re.fullmatch(r"installed-(?P<ENGINE>\w+)-ray-(?P<RAY>[\d.]+)", installed)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHONPATH", "RAY_ADDRESS")
    }
    with (
        # Ray's sockets have at most a hundred characters, and what it finds by itself is in there.
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as ray_folder,
        processes.none_left(),
    ):
        environment |= as_here.groupdict() if as_here else {}
        environment |= {
            "PATH": f"{folder / '.venv' / 'bin'}{os.pathsep}{environment['PATH']}",
            "RAY_TMPDIR": ray_folder,
            "RAYSERVE_HOOKS_RUN": os.environ["RAYSERVE_HOOKS_RUN"],
        }
        shell = Shell(folder, environment, folder.parent / "output.txt")
        try:
            yield shell
        finally:
            shell.process.kill()
            shell.close()


def wait_for_an_answer(shell: Shell) -> None:
    question = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    url = "http://127.0.0.1:8000/v1/chat/completions"

    def answered() -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.post(url, json=question, timeout=60).status_code == 200
        return False

    try:
        until(answered, 240, every_s=0.5)  # what listens there does not exist yet
    except AssertionError as error:
        raise AssertionError(shell.output.read_text()) from error


@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page(page: Path, tmp_path: Path) -> None:
    with shell_in_a_clone(tmp_path / "clone") as shell:
        for command in BEFORE.get(page.name, []) + commands_of(page):
            if command in NOT_RUN:
                continue
            before = len(shell.output.read_text())
            shell.start(command)
            if command in SERVES:
                wait_for_an_answer(shell)
                shell.interrupt()
            code = shell.code()
            said = shell.output.read_text()[before:]
            assert code == 0, f"{command}\n{said}"
            missing = [text for text in SAYS.get(command, ()) if text not in said]
            assert not missing, f"{command}\n{missing}\n{said}"
            if command in ENDS_ALL:
                ours = processes.marked("RAY_TMPDIR", shell.ray_folder)
                assert [process.pid for process in ours] == [shell.process.pid], command


def test_what_is_not_run_or_is_treated_otherwise_is_in_a_page() -> None:
    assert {*NOT_RUN, *SERVES, *SAYS, *ENDS_ALL} <= COMMANDS
    assert BEFORE.keys() <= {page.name for page in PAGES}


# Here, as what is in one file runs in one process: two demos that start at the same time take a
# machine of two cores longer than the 30 seconds that Ray waits for its raylet.
@pytest.mark.engine
@pytest.mark.timeout(400)
# A terminal sends Ctrl-C to the whole foreground group; make hands SIGTERM on to its child.
@pytest.mark.parametrize(
    ("send", "signal_number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)]
)
def test_a_demo_that_is_interrupted_leaves_no_process(
    send: Callable[[int, int], None], signal_number: signal.Signals
) -> None:
    mark = uuid.uuid4().hex
    environment = {**os.environ, "DEMO_TEST": mark, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "demo.py")],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as demo:
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
