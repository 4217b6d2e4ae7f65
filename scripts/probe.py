"""Look whether a Ray has what this package stands on, without importing it, an engine or a GPU.

The Python files of a wheel are read and parsed, which takes seconds. A name that is missing is
looked for in the rest of Ray, so that the report says where it has gone.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ray_contract import FEATURES, NAMES, ORDERS, Feature, Name, Order

ROOT = Path(__file__).parent.parent
WHEELS = ROOT / ".cache" / "ray-wheels"
FIRST = "2.51"  # the first minor with the callback slot
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Files(Protocol):
    """The Python files of a Ray, by their path in a site-packages folder."""

    def names(self) -> Iterable[str]: ...

    def text(self, name: str) -> str: ...


class Wheel:
    """The files of a wheel."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        self._names = frozenset(name for name in self._zip.namelist() if name.endswith(".py"))

    def names(self) -> Iterable[str]:
        return self._names

    def text(self, name: str) -> str:
        return self._zip.read(name).decode()


class Installed:
    """The files of an installed Ray."""

    def __init__(self, site_packages: Path) -> None:
        self._folder = site_packages

    @functools.cached_property
    def _names(self) -> frozenset[str]:
        found = (self._folder / "ray").rglob("*.py")
        return frozenset(path.relative_to(self._folder).as_posix() for path in found)

    def names(self) -> Iterable[str]:
        return self._names

    def text(self, name: str) -> str:
        return (self._folder / name).read_text()


@dataclass(frozen=True)
class Found:
    """What defines a name: a node of its module's source, or None for a module."""

    node: ast.AST | None
    source: str

    @property
    def text(self) -> str:
        """The source of the name alone."""
        return ast.get_source_segment(self.source, self.node) or "" if self.node else self.source


class Ray:
    """A Ray that is read, not imported."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._names = frozenset(files.names())
        self._module = functools.cache(self._read)

    def problems(self) -> list[str]:
        """Return what is not as the contract has it, one line each."""
        names = [problem for name in NAMES for problem in self._name_problems(name)]
        return [*names, *(problem for order in ORDERS for problem in self._order_problems(order))]

    def has(self, feature: Feature) -> bool:
        """Return whether this Ray has a feature."""
        found = self.find(feature.of)
        return found is not None and feature.part in found.text

    def find(self, name: Name) -> Found | None:
        """Return what defines a name, through modules and classes; None if nothing does."""
        path = self._file_of(name.module)
        if path is None:
            return None
        first, *rest = name.name.split(".")
        source, tree = self._module(path)
        node = _defined(tree, first)
        if node is None:
            below = self._file_of(f"{name.module}.{first}")
            return Found(None, self._module(below)[0]) if below and not rest else None
        for part in rest:
            node = _defined(node, part)
            if node is None:
                return None
        return Found(node, source)

    def _name_problems(self, name: Name) -> Iterator[str]:
        found = self.find(name)
        if found is None:
            yield f"{name} is not there; expected in {self._expected(name)}{self._elsewhere(name)}"
            return
        node = found.node
        if name.is_async is not None and isinstance(node, ast.AsyncFunctionDef) != name.is_async:
            kind = "a coroutine function" if name.is_async else "a plain function"
            yield f"{name} is not {kind} in {self._file_of(name.module)}"
        if name.takes and isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            has = _parameters(node)
            wanted = [part for part in name.takes if not part.startswith("*")]
            missing = [part for part in name.takes if part not in has]
            places = [has.index(part) for part in wanted if part in has]
            if missing or places != sorted(places):
                yield (
                    f"{name} takes ({', '.join(has)}) in {self._file_of(name.module)}; expected "
                    f"({', '.join(name.takes)}) in this order"
                )

    def _order_problems(self, order: Order) -> Iterator[str]:
        found = self.find(order.of)
        if found is None:
            return  # one of the names
        places = [found.text.find(part) for part in order.parts]
        missing = [part for part, place in zip(order.parts, places, strict=True) if place < 0]
        where = f"in {self._file_of(order.of.module)}"
        for part in missing:
            yield f"{order.of} has no {part!r} {where}"
        if not missing and places != sorted(places):
            expected = ", ".join(map(repr, order.parts))
            yield f"{order.of} has another order {where}; expected {expected}"

    def _expected(self, name: Name) -> str:
        path = self._file_of(name.module)
        if path is None:
            return f"{name.module.replace('.', '/')}.py, which is not there either"
        return path

    def _elsewhere(self, name: Name) -> str:
        """Return where a name is defined instead; nothing if nowhere."""
        last = name.name.rpartition(".")[2]
        if last.startswith("__"):
            last = name.name.split(".")[0]
        pattern = re.compile(rf"^ *(async def|def|class) {last}\b|^ *{last} *[:=]", re.MULTILINE)
        own = self._file_of(name.module)
        rooms = ("ray/llm/", "ray/serve/", "ray/util/", "ray/autoscaler/", "ray/_private/")
        likely = [path for path in sorted(self._names) if path.startswith(rooms) and path != own]
        places = [path for path in likely if pattern.search(self._files.text(path))]
        if own is not None and pattern.search(self._files.text(own)):
            places.insert(0, f"{own} itself, elsewhere")
        if not places:
            return "; found nowhere"
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        return f"; found in {', '.join(places[:3])}{more}"

    def _file_of(self, module: str) -> str | None:
        path = module.replace(".", "/")
        return next((p for p in (f"{path}.py", f"{path}/__init__.py") if p in self._names), None)

    def _read(self, path: str) -> tuple[str, ast.Module]:
        source = self._files.text(path)
        return source, ast.parse(source)


def _defined(scope: ast.AST, name: str) -> ast.AST | None:
    """Return what binds a name directly in a module or class, in either branch of an ``if``."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            if node.name == name:
                return node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(part, ast.Name) and part.id == name for part in targets):
                return node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if any((alias.asname or alias.name) == name for alias in node.names):
                return node
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            found = _defined(node, name)
            if found is not None:
                return found
    return None


def _parameters(node: ast.AST) -> list[str]:
    """Return a function's parameters, or the fields of a dataclass, in order."""
    if isinstance(node, ast.ClassDef):
        return [
            part.target.id
            for part in node.body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        ]
    assert isinstance(node, _FUNCTIONS)
    arguments = node.args
    names = [part.arg for part in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [*names, *([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])]


def minor_of(version: str) -> tuple[int, int]:
    """Return ``(2, 60)`` for ``"2.60.1"``."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def feature_problems(ray: Ray, version: str) -> list[str]:
    """Return which features have come or gone in another minor than the contract says."""
    problems = []
    for feature in FEATURES:
        gone = feature.until is not None and minor_of(version) >= minor_of(feature.until)
        expected = minor_of(version) >= minor_of(feature.since) and not gone
        if ray.has(feature) != expected:
            what = "has" if ray.has(feature) else "has not"
            until = f", until {feature.until}" if feature.until else ""
            problems.append(
                f"{what} the feature {feature.text!r} ({feature.of}); expected since "
                f"{feature.since}{until}"
            )
    return problems


def tested_minors() -> list[str]:
    """Return the minors that this package is tested with."""
    sys.path.insert(0, str(ROOT))
    from rayserve_hooks.cluster.versions import TESTED

    return list(TESTED)


def versions_on_index() -> list[str]:
    """Return the newest release of each minor since the callback slot came, oldest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", "ray"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = re.search(r"Available versions: (.*)", done.stdout)
    if found is None:
        raise SystemExit(f"probe: pip names no versions of Ray: {done.stdout}{done.stderr}")
    newest: dict[tuple[int, int], str] = {}
    for version in found[1].split(", "):  # newest first
        if re.fullmatch(r"[\d.]+", version) and minor_of(version) >= minor_of(FIRST):
            newest.setdefault(minor_of(version), version)
    return [newest[minor] for minor in sorted(newest)]


def fetch(version: str) -> tuple[str, Ray]:
    """Return the full version and the Ray of a release or minor; a wheel is downloaded once."""
    wanted = version if version.count(".") > 1 else f"{version}.*"
    pattern = f"ray-{version}-*.whl" if version.count(".") > 1 else f"ray-{version}.*.whl"
    if not any(WHEELS.glob(pattern)):
        # One platform's wheel will do on all: its Python files are read, nothing of it runs.
        platform = ["--python-version", "3.11", "--platform", "manylinux2014_x86_64"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *platform]
        command += ["--only-binary=:all:", "--dest", str(WHEELS), f"ray=={wanted}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"probe: pip cannot download Ray {version}: {done.stderr.strip()}")
    wheels = {path.name.split("-")[1]: path for path in WHEELS.glob(pattern)}
    newest = max(wheels, key=lambda version: [int(part) for part in version.split(".")])
    return newest, Ray(Wheel(wheels[newest]))


def probe(versions: Sequence[str]) -> bool:
    """Print what each version has and has not; return whether all tested ones are as expected.

    What is wrong in a version that is not tested is printed, and no failure.
    """
    tested = tested_minors()
    good = True
    rows = []
    for asked in versions:
        version, ray = fetch(asked)
        minor = ".".join(version.split(".")[:2])
        problems = [*ray.problems(), *feature_problems(ray, version)]
        role = "tested" if minor in tested else "older than tested"
        if minor_of(version) > minor_of(tested[-1]):
            role = "newer than tested"
            print(f"warning: Ray {version} is newer than Ray {tested[-1]}, the newest tested one")
        many = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        result = many if problems else f"all {len(NAMES)} names"
        rows.append((version, role, result, *("yes" if ray.has(f) else "-" for f in FEATURES)))
        print(f"Ray {version} ({role}): {result}")
        for problem in problems:
            print(f"  - {problem}")
        good = good and not (problems and (minor in tested or len(versions) == 1))
    print()
    print(table(("Ray", "", "contract", *(feature.text for feature in FEATURES)), rows))
    return good


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", help="releases or minors of Ray, such as 2.57.1")
    parser.add_argument("--all", action="store_true", help=f"every minor since {FIRST}")
    options = parser.parse_args()
    if options.all == bool(options.versions):
        parser.error("name versions of Ray, or give --all")
    return 0 if probe(options.versions or versions_on_index()) else 1


if __name__ == "__main__":
    sys.exit(main())
