"""The rooms of the package: which way imports point, and who may touch whose private parts."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pluggy
import pytest
from plugins_for_tests import run_script

ROOT = Path(__file__).parent.parent
PACKAGE = "rayserve_hooks"

CONTRACT = ("errors", "trace", "hookspecs", "context", "findings")
RAY = ("ray", "vllm")


@dataclass(frozen=True)
class Room:
    """What the modules of a room may import.

    Attributes:
        rule: The same in words, for the message.
        rooms: The rooms; a dot makes it one module or one name.
        typing: What else, for annotations only: under ``TYPE_CHECKING``.
        others: Third-party packages; None means any.
        no_others: Third-party packages that are not allowed where ``others`` is None.
    """

    rule: str
    rooms: tuple[str, ...]
    typing: tuple[str, ...] = ()
    others: tuple[str, ...] | None = None
    no_others: tuple[str, ...] = ()


ROOMS = {
    "errors": Room("errors imports nothing but the standard library", (), others=()),
    "trace": Room("trace imports nothing but the standard library", (), others=()),
    "findings": Room("findings imports nothing but the standard library", (), others=()),
    "hookspecs": Room(
        "hookspecs imports pluggy, trace and errors; context for annotations only",
        ("trace", "errors"),
        typing=("context",),
        others=("pluggy",),
    ),
    "context": Room(
        "context imports hookspecs, trace and errors; Ray and vLLM for annotations only",
        ("hookspecs", "trace", "errors"),
        typing=("ray", "vllm"),
        others=(),
    ),
    "core": Room(
        "core imports the contract, itself, pluggy and pydantic",
        (*CONTRACT, "core"),
        others=("pluggy", "pydantic", "pydantic_core"),
    ),
    "download": Room(
        "download imports itself, errors, core.masking, core.masked_errors and "
        "NodeModelDownloadable; no Ray, vLLM or pluggy",
        (
            "download",
            "errors",
            "core.masking",
            "core.masked_errors",
            "context.NodeModelDownloadable",
        ),
        no_others=(*RAY, "pluggy"),
    ),
    "impls": Room(
        "impls import what any callback may: the contract, core.arguments, the masking of secrets, "
        "what brings files, and what impls share",
        (
            *CONTRACT,
            "core.arguments",
            "core.validation",
            "core.threads.check_given_up",
            "core.masking",
            "core.known_secrets",
            "download.caller",
            "download.files",
            "download.hub",
            "download.objects",
            "download.safe_files",
            "cluster.adapters",
            "cluster._vllm.compile_variables",
            "impls._archive",
            "impls._startup",
        ),
    ),
    "cluster": Room(
        "cluster imports all but cli, impls and, its version excepted, the package's __init__",
        (*CONTRACT, "core", "download", "cluster", "__init__.__version__"),
    ),
    "testing": Room(
        "testing imports what runs a start, and pytest; no Ray or vLLM",
        (*CONTRACT, "core", "download", "cluster", "testing"),
        others=("pytest",),
    ),
    "cli": Room(
        "cli imports all but impls, which are loaded by name",
        (*CONTRACT, "core", "download", "cluster", "cli", "__init__"),
        no_others=RAY,
    ),
    "__main__": Room("__main__ imports the command line", ("cli",), others=()),
    "__init__": Room(
        "the package's __init__ loads its names lazily; for annotations it imports all but cli "
        "and impls",
        (),
        typing=(*CONTRACT, "core", "download", "cluster"),
        others=(),
    ),
}

PRIVATE_LINK = ("context", "core.recorder")
PLUGGY_INSIDE = ("core._pluggy",)
RAY_INSIDE = ("cluster._ray",)
VLLM_INSIDE = ("cluster._vllm",)
# For annotations, the entry points that anybody may register, and the variables that it documents.
# What vLLM exports itself is public, too.
VLLM_PUBLIC = ("vllm.engine.protocol", "vllm.general_plugins", "vllm.envs")


@dataclass(frozen=True)
class Module:
    """A module's source.

    Attributes:
        name: Its name below the package; ``"__init__"`` for the package itself.
        path: Its file, for messages.
    """

    name: str
    path: str
    source: str = field(repr=False)

    @property
    def tree(self) -> ast.Module:
        return _parsed(self.source)

    @property
    def room(self) -> str:
        return self.name.partition(".")[0]


@functools.cache
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        name: As Python knows it, such as ``"rayserve_hooks.context.CallbackCtx"``.
        line: Where.
        typing: Whether only type checkers see it.
        inside: Whether it is in a function, which runs later than the import of the module.
    """

    name: str
    line: int
    typing: bool = False
    inside: bool = False


def imports_of(module: Module) -> Iterator[Import]:
    """Yield every import, also those in functions and under ``TYPE_CHECKING``."""
    yield from _imports(module.tree.body, module, typing=False, inside=False)


def _imports(
    nodes: Iterable[ast.AST], module: Module, *, typing: bool, inside: bool
) -> Iterator[Import]:
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, typing, inside)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(f"{_origin(node, module)}.{alias.name}", node.lineno, typing, inside)
        elif isinstance(node, ast.Call) and _dotted(node.func) == "importlib.import_module":
            if isinstance(node.args[0], ast.Constant):
                yield Import(str(node.args[0].value), node.lineno, typing, inside)
        elif isinstance(node, ast.If) and _dotted(node.test).endswith("TYPE_CHECKING"):
            yield from _imports(node.body, module, typing=True, inside=inside)
            yield from _imports(node.orelse, module, typing=typing, inside=inside)
            continue
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(
            ast.iter_child_nodes(node), module, typing=typing, inside=inside or function
        )


def _origin(node: ast.ImportFrom, module: Module) -> str:
    if not node.level:
        return node.module or ""
    here = f"{PACKAGE}.{module.name}".split(".")
    base = here[: len(here) - node.level + (module.path.endswith("__init__.py"))]
    return ".".join([*base, *filter(None, [node.module])])


def _dotted(node: ast.AST) -> str:
    """Return ``"a.b.c"`` for such an expression, an empty string for any other."""
    if isinstance(node, ast.Name):
        return node.id
    inner = _dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner and isinstance(node, ast.Attribute) else ""


def below(name: str, *places: str) -> bool:
    """Return whether a dotted name is one of the places, or below it."""
    return any(f"{name}.".startswith(f"{place}.") for place in places)


def own_name(name: str) -> str | None:
    """Return an imported name below the package; None if it is of another one."""
    if not below(name, PACKAGE):
        return None
    rest = name.removeprefix(PACKAGE).removeprefix(".")
    room = rest.partition(".")[0]
    if room in ROOMS:
        return rest
    return f"__init__.{rest}" if rest else "__init__"  # such as rayserve_hooks.LLMConfig


def problems_of(module: Module) -> list[str]:
    """Return what breaks the rule of the module's room, one message for each import."""
    room = ROOMS.get(module.room)
    if room is None:
        return [f"{module.path}:1: belongs to no room; add it to ROOMS, with what it may import"]
    return [
        f"{module.path}:{found.line}: imports {found.name}; {room.rule}"
        for found in imports_of(module)
        if not _allowed(found, room)
    ]


def _allowed(found: Import, room: Room) -> bool:
    own = own_name(found.name)
    if own is not None:
        return below(own, *room.rooms, *(room.typing if found.typing else ()))
    other = found.name.partition(".")[0]
    if other in sys.stdlib_module_names or (found.typing and other in room.typing):
        return True
    return other not in room.no_others if room.others is None else other in room.others


def circles(modules: Mapping[str, Module]) -> list[str]:
    """Return where modules import each other while they are imported."""
    edges: dict[str, dict[str, int]] = {name: {} for name in modules}
    for name, module in modules.items():
        for found in imports_of(module):
            target = _module_of(found, modules)
            if target not in (None, name) and not found.typing and not found.inside:
                edges[name].setdefault(str(target), found.line)
    problems = []
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            circle = [*way[way.index(name) :], name]
            line = edges[circle[0]][circle[1]]
            problems.append(
                f"{modules[circle[0]].path}:{line}: a circle of imports: {' -> '.join(circle)}"
            )
        elif name not in done:
            for target in edges[name]:
                walk(target, (*way, name))
            done.add(name)

    for name in modules:
        walk(name, ())
    return problems


def _module_of(found: Import, modules: Mapping[str, Module]) -> str | None:
    own = own_name(found.name)
    while own and own not in modules:  # a name in a module, such as context.CallbackCtx
        own = own.rpartition(".")[0]
    return own


PLUGGY_PRIVATE = {
    name
    for pluggys in (
        pluggy.PluginManager(PACKAGE),
        pluggy.PluginManager(PACKAGE).hook,
        pluggy.HookCaller,
        pluggy.HookImpl,
        pluggy.HookimplMarker(PACKAGE),
        pluggy.HookspecMarker(PACKAGE),
        pluggy.Result,
    )
    for name in dir(pluggys)
    if re.match("_[^_]", name)
}
MARKS = {f"{PACKAGE}_impl", f"{PACKAGE}_spec", "_impl", "_spec"}


def private_problems(module: Module) -> list[str]:
    """Return where a module touches what belongs to another one alone."""
    problems = []
    for node in ast.walk(module.tree):
        for name in _named(node):
            rule = _private_rule(name, module)
            if rule:
                problems.append(f"{module.path}:{node.lineno}: uses {name}; {rule}")  # type: ignore[attr-defined]
    for found in imports_of(module):
        rule = _private_rule(found.name, module)
        if rule:
            problems.append(f"{module.path}:{found.line}: imports {found.name}; {rule}")
    return problems


def _named(node: ast.AST) -> Iterator[str]:
    """Yield what an expression names: an attribute alone and with its path, or a string."""
    if isinstance(node, ast.Attribute):
        yield node.attr
        yield _dotted(node)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def _private_rule(name: str, module: Module) -> str:
    if name == "_state" and module.name not in PRIVATE_LINK:
        return "the link of context and recorder is used in context.py and core/recorder.py only"
    pluggys = name in PLUGGY_PRIVATE | MARKS or (below(name, "pluggy") and "._" in name)
    if pluggys and module.name not in PLUGGY_INSIDE:
        return "pluggy's private attributes are used in core/_pluggy.py only"
    rays = re.fullmatch(r"ray(\.\w+)*\._(?!_version__)[\w.]*(:\w+)?", name) or below(
        name, "ray.serve.context"
    )
    if rays and module.name not in RAY_INSIDE:
        return "Ray's internals are used in cluster/_ray.py only"
    vllms = re.fullmatch(r"vllm\.[a-z]\w*(\.\w+)*(:\w+)?", name) and not below(name, *VLLM_PUBLIC)
    if vllms and module.name not in VLLM_INSIDE:
        return "vLLM's internals are used in cluster/_vllm.py only"
    return ""


# What Ray has brought from a process of the same job. Never a file, which another may have written:
# but for the engine's processes', in a folder that is checked to be this user's alone.
UNPICKLES = (
    "errors",
    "core.instances",
    "cluster.travel",
    "cluster.engine_folder",
    "testing.travel",
)
# They check owner and mode. The lock believes nothing in it.
SHARED_FOLDERS = ("download.node_lock", "cluster.engine_folder")
UNPICKLERS = re.compile(r"(pickle|cloudpickle|dill|_pickle)\.(loads|Unpickler)")
RUNNERS = re.compile(
    r"(pickle|cloudpickle|dill|_pickle|marshal|joblib|torch|numpy|np)\.load|marshal\.loads"
    r"|shelve\.open|exec|eval|compile|runpy\.\w+|yaml\.(load|unsafe_load|full_load)\w*|imp\.\w+"
    r"|importlib\.util\.spec_from_file_location|importlib\.machinery\.\w+|execfile"
    r"|os\.(system|popen|exec\w+|spawn\w+)|subprocess\.\w+"
)
FOLDERS = re.compile(r"/(tmp|var/tmp|dev/shm)(/.*)?")


def trust_problems(module: Module) -> list[str]:
    """Return where a module could take something from a file that another user has written."""
    problems = []
    for node in ast.walk(module.tree):
        rule = _trust_rule(node, module)
        if rule:
            problems.append(f"{module.path}:{node.lineno}: {rule}")  # type: ignore[attr-defined]
    folders = (found for found in imports_of(module) if below(found.name, "tempfile"))
    if module.name not in SHARED_FOLDERS:
        problems.extend(f"{module.path}:{found.line}: {_NO_SHARED_FOLDER}" for found in folders)
    return problems


_NO_SHARED_FOLDER = (
    "folders that others can write are used in download/node_lock.py and "
    "cluster/engine_folder.py only"
)


def _trust_rule(node: ast.AST, module: Module) -> str:
    name = _dotted(node)
    if name and UNPICKLERS.fullmatch(name) and module.name not in UNPICKLES:
        return f"uses {name}; bytes are unpickled where Ray has brought them only"
    if name and RUNNERS.fullmatch(name):
        return f"uses {name}; nothing in a file is unpickled or executed"
    text = node.value if isinstance(node, ast.Constant) else None
    shared = isinstance(text, str) and FOLDERS.fullmatch(text)
    return _NO_SHARED_FOLDER if shared and module.name not in SHARED_FOLDERS else ""


def package_modules() -> dict[str, Module]:
    folder = ROOT / PACKAGE
    modules = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        modules[name] = Module(name, str(path.relative_to(ROOT)), path.read_text())
    return modules


def module(name: str, source: str) -> Module:
    return Module(name, f"{PACKAGE}/{name.replace('.', '/')}.py", source)


def report(problems: Iterable[str]) -> None:
    text = "\n".join(problems)
    assert not text, f"\n{text}"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_of_a_room_keep_its_rule(room: str) -> None:
    modules = [module for module in package_modules().values() if module.room == room]
    assert modules, f"no module is in room {room!r}; drop it from ROOMS"
    report(problem for module in modules for problem in problems_of(module))


def test_every_module_is_in_a_room() -> None:
    report(
        problem
        for module in package_modules().values()
        if module.room not in ROOMS
        for problem in problems_of(module)
    )


def test_no_modules_import_each_other() -> None:
    report(circles(package_modules()))


@pytest.mark.parametrize("room", ROOMS)
def test_private_parts_are_used_where_they_belong(room: str) -> None:
    modules = (module for module in package_modules().values() if module.room == room)
    report(problem for module in modules for problem in private_problems(module))


def test_nothing_that_another_user_could_have_written_is_run() -> None:
    report(problem for module in package_modules().values() for problem in trust_problems(module))


@pytest.mark.parametrize("name", [*UNPICKLES, *SHARED_FOLDERS])
def test_a_module_that_may_is_one_that_does(name: str) -> None:
    found = package_modules()[name]
    assert trust_problems(Module("cluster.other", found.path, found.source)), (
        f"{name} does nothing of the kind any more; drop it"
    )


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("import pickle\npickle.load(file)", "uses pickle.load; nothing in a file is unpickled"),
        ("import pickle\npickle.loads(data)", "uses pickle.loads; bytes are unpickled where Ray"),
        ("import pickle\nf(pickle.loads)", "uses pickle.loads; bytes are unpickled where Ray"),
        (
            "import tempfile",
            (
                "folders that others can write are used in download/node_lock.py and "
                "cluster/engine_folder.py only"
            ),
        ),
        ("from tempfile import gettempdir", "folders that others can write"),
        ("Path('/tmp/mailbox')", "folders that others can write"),
        ("exec(path.read_text())", "uses exec; nothing in a file"),
        ("import yaml\nyaml.load(text)", "uses yaml.load; nothing in a file"),
        ("import torch\ntorch.load(path)", "uses torch.load; nothing in a file"),
        ("subprocess.run(x)", "uses subprocess.run; nothing in a file"),
    ],
)
def test_what_could_run_another_users_file_is_reported(source: str, rule: str) -> None:
    broken = module("cluster.node", source)
    (problem,) = trust_problems(broken)
    assert problem.startswith(f"{broken.path}:{source.count(chr(10)) + 1}: {rule}")


def test_the_tests_of_core_need_neither_cluster_nor_ray() -> None:
    tests = ROOT / "tests"
    rule = "tests of core import no other room, the kit excepted, and no Ray"
    core = Room(rule, (*CONTRACT, "core", "testing"), no_others=RAY)
    files = [*(tests / "core").glob("*.py"), tests / "steps.py", tests / "plugins_for_tests.py"]
    report(
        f"{path.relative_to(ROOT)}:{found.line}: imports {found.name}; {rule}"
        for path in sorted(files)
        for found in imports_of(Module(path.stem, str(path), path.read_text()))
        if not _allowed(found, core)
    )


def test_contract_and_core_are_imported_where_there_is_no_ray() -> None:
    names = [
        f"{PACKAGE}.{name}"
        for name, module in package_modules().items()
        if module.room in (*CONTRACT, "core")
    ]
    script = f"""
        import importlib, sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {RAY}:
                    raise ModuleNotFoundError(f"no {{name}} here", name=name)

        sys.meta_path.insert(0, Absent())
        for name in {names}:
            importlib.import_module(name)
        print(len({names}))
    """
    assert run_script(script) == str(len(names))


TYPING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
IN_FUNCTION = "def f():\n    "


@pytest.mark.parametrize(
    ("name", "source", "line"),
    [
        ("errors", "from rayserve_hooks.trace import Trace", 1),
        ("errors", "import pluggy", 1),
        ("trace", "import rayserve_hooks.errors", 1),
        ("trace", f"{IN_FUNCTION}from rayserve_hooks.core.masking import shown", 2),
        ("hookspecs", "from rayserve_hooks.context import CallbackCtx", 1),
        ("hookspecs", "import pydantic", 1),
        ("hookspecs", f"{TYPING}from rayserve_hooks.core.hooks import HOOKS", 3),
        ("context", "import ray", 1),
        ("context", f"{IN_FUNCTION}from ray.serve.llm import LLMConfig", 2),
        ("context", "from rayserve_hooks.core.recorder import Recorder", 1),
        ("context", f"{TYPING}import pydantic", 3),
        ("core.stack", "from rayserve_hooks.cluster import _ray", 1),
        ("core.stack", f"{TYPING}from rayserve_hooks.cluster.config import LLMConfig", 3),
        ("core.stack", "from rayserve_hooks import CallbackCtx", 1),
        ("core.stack", "from ..cluster import _ray", 1),
        ("core.stack", f"{IN_FUNCTION}from ray import cloudpickle", 2),
        ("core.stack", f"{TYPING}from ray.serve.llm import LLMConfig", 3),
        ("core.stack", "import yaml", 1),
        ("core.stack", "import importlib\nimportlib.import_module('rayserve_hooks.cli')", 2),
        ("download.model", "from rayserve_hooks.context import CallbackCtx", 1),
        ("download.model", "from rayserve_hooks.core.log import LOGGER_NAME", 1),
        ("download.model", f"{IN_FUNCTION}from ray.experimental import tqdm_ray", 2),
        ("download.model", "import pluggy", 1),
        ("impls.report", "from rayserve_hooks.core.log import LOGGER_NAME", 1),
        ("impls.report", f"{IN_FUNCTION}from rayserve_hooks.cluster import _ray", 2),
        ("impls.report", "from rayserve_hooks import hookimpl", 1),
        ("cluster.slot", "from rayserve_hooks.cli import main", 1),
        ("cluster.slot", "from rayserve_hooks.impls.download_policy import DownloadPolicy", 1),
        ("cluster.slot", "from rayserve_hooks import HooksCallback", 1),
        ("cli", "from rayserve_hooks.impls import startup_metrics", 1),
        ("cli", "import ray", 1),
        ("__init__", "from rayserve_hooks.context import CallbackCtx", 1),
        ("__init__", f"{TYPING}from rayserve_hooks.cli import main", 3),
    ],
)
def test_a_broken_rule_is_reported_with_file_and_line(name: str, source: str, line: int) -> None:
    broken = module(name, source)
    (problem,) = problems_of(broken)
    rule = ROOMS[broken.room].rule
    assert re.fullmatch(rf"{broken.path}:{line}: imports [\w.]+; {re.escape(rule)}", problem)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("errors", "import pickle"),
        ("hookspecs", f"import pluggy\n{TYPING}from rayserve_hooks.context import CallbackCtx"),
        ("context", f"{TYPING}from ray.serve.llm import LLMConfig"),
        ("context", "from rayserve_hooks.trace import Trace"),
        ("core.stack", "from rayserve_hooks.core import _pluggy\nfrom pydantic import BaseModel"),
        ("core.stack", "from . import limits\nfrom ..errors import HookError"),
        (
            "download.model",
            "import boto3\nfrom rayserve_hooks.context import NodeModelDownloadable",
        ),
        ("impls.report", f"import torch\n{IN_FUNCTION}from ray.util.metrics import Histogram"),
        ("impls.report", "from rayserve_hooks.core.arguments import checked_arguments"),
        ("cluster.slot", "import ray\nfrom rayserve_hooks.download.model import Mirror"),
        ("cli", "from rayserve_hooks import hookimpl\nfrom rayserve_hooks.cluster import stacks"),
        ("__init__", f"import importlib\n{TYPING}from rayserve_hooks.cluster.slot import X"),
    ],
)
def test_what_a_rule_allows_is_not_reported(name: str, source: str) -> None:
    assert problems_of(module(name, source)) == []


def test_a_module_without_a_room_is_reported() -> None:
    (problem,) = problems_of(module("extras.fancy", ""))
    assert problem.startswith("rayserve_hooks/extras/fancy.py:1: belongs to no room; ")


def test_a_circle_is_reported_with_the_way_round() -> None:
    modules = [
        module("core.a", "import json\nfrom rayserve_hooks.core.b import x"),
        module("core.b", "from rayserve_hooks.core import c"),
        module("core.c", "import rayserve_hooks.core.a"),
    ]
    assert circles({module.name: module for module in modules}) == [
        "rayserve_hooks/core/a.py:2: a circle of imports: core.a -> core.b -> core.c -> core.a"
    ]


@pytest.mark.parametrize("later", [IN_FUNCTION, TYPING])
def test_what_is_imported_later_or_for_annotations_makes_no_circle(later: str) -> None:
    modules = [
        module("core.a", "from rayserve_hooks.core import b"),
        module("core.b", f"{later}from rayserve_hooks.core import a"),
    ]
    assert circles({module.name: module for module in modules}) == []


@pytest.mark.parametrize(
    ("name", "source", "what", "rule"),
    [
        ("core.calls", "ctx._state.nodes", "uses _state", "the link of context and recorder"),
        ("cluster.node", "getattr(ctx, '_state')", "uses _state", "the link of context"),
        ("core.manager", "caller._hookimpls", "uses _hookimpls", "pluggy's private attributes"),
        ("core.manager", "self._name2plugin", "uses _name2plugin", "pluggy's private attributes"),
        ("cli", "f.rayserve_hooks_impl", "uses rayserve_hooks_impl", "pluggy's private"),
        ("cli", "getattr(f, f'{project}_spec')", "uses _spec", "pluggy's private attributes"),
        ("core.calls", "from pluggy._result import Result", "imports pluggy._result", "pluggy's"),
        ("cluster.slot", "import ray.llm._internal.common", "imports ray.llm._int", "Ray's"),
        ("cluster.slot", "from ray._private import x", "imports ray._private.x", "Ray's"),
        ("impls.report", "from ray.serve._private import x", "imports ray.serve._pri", "Ray's"),
        ("cluster.slot", f"{TYPING}from ray.serve.context import x", "imports ray.serve", "Ray's"),
        ("cluster.slot", "ray._private.worker", "uses ray._private", "Ray's internals"),
        ("cli", "load('ray.llm._internal.common:X')", "uses ray.llm._internal", "Ray's internals"),
        ("cluster.slot", "from vllm.plugins import x", "imports vllm.plugins.x", "vLLM's"),
        ("cluster.slot", "import vllm.v1.engine.core", "imports vllm.v1.engine", "vLLM's"),
    ],
)
def test_a_private_part_in_the_wrong_file_is_reported(
    name: str, source: str, what: str, rule: str
) -> None:
    broken = module(name, source)
    problems = private_problems(broken)
    assert problems
    line = source.count("\n") + 1
    start = f"{broken.path}:{line}: {what}"
    assert all(problem.startswith(start) and f"; {rule}" in problem for problem in problems)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("context", "self._state"),
        ("core.recorder", "ctx._state.recorder"),
        ("core._pluggy", "caller._hookimpls\ngetattr(f, f'{project}_impl')"),
        ("cluster._ray", "from ray.llm._internal.common import x\nimport ray.serve.context"),
        ("cluster.slot", "from ray.serve.llm import LLMConfig\nray.serve.get_replica_context()"),
        ("cluster._vllm", "from vllm.plugins import x"),
        ("impls.report", "from vllm import SamplingParams"),
        ("context", f"{TYPING}from vllm.engine.protocol import EngineClient"),
        ("core.log", "'''Of ray.serve._private.logging_utils, Ray 2.60.'''"),
        ("core.loading", "importlib.util.find_spec(name)"),
    ],
)
def test_a_private_part_in_its_own_file_is_not_reported(name: str, source: str) -> None:
    assert private_problems(module(name, source)) == []
