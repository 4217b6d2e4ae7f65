"""The contract with Ray names all that is used, and the probe says by name what has moved."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import probe
import pytest
import ray_contract
from probe import Found, Installed, Ray, Wheel, feature_problems
from probe import probe as run_probe
from ray_contract import FEATURES, NAMES, ORDERS, SCHEMA, Feature, Name, Order

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "rayserve_hooks"


class Files(dict[str, str]):
    """Python files in memory."""

    def names(self) -> Iterator[str]:
        return iter(self)

    def text(self, name: str) -> str:
        return self[name]


def site_packages() -> Path:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.parent


def problems(files: dict[str, str], *contract: Name | Order) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "NAMES", [part for part in contract if isinstance(part, Name)])
        patch.setattr(probe, "ORDERS", [part for part in contract if isinstance(part, Order)])
        return Ray(Files(files)).problems()


def test_the_installed_ray_is_as_the_contract_has_it() -> None:
    assert Ray(Installed(site_packages())).problems() == []


def test_the_installed_ray_has_the_features_of_its_minor() -> None:
    import ray

    assert feature_problems(Ray(Installed(site_packages())), ray.__version__) == []


# What a name of Ray that is an instance, or returns one, is made by.
INSTANCES = {
    "ray.get_runtime_context()": "ray.runtime_context.RuntimeContext",
    "ray.util.client.ray": "ray.util.client.RayAPIStub",
}


def used_names() -> set[str]:
    """Return all names of Ray that the package imports, or reaches as ``ray.…``."""
    used = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and re.match(r"ray(\.|$)", node.module or ""):
                used |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Attribute):
                text = ast.unparse(node)
                for instance, made_by in INSTANCES.items():
                    text = text.replace(instance, made_by)
                if re.fullmatch(r"ray(\.\w+)+", text):
                    used.add(text)
    # Such as ray.util of ray.util.get_node_ip_address.
    return {name for name in used if not any(other.startswith(f"{name}.") for other in used)}


def test_the_contract_names_all_that_is_imported_from_ray() -> None:
    named = {str(name) for name in NAMES}
    missing = sorted(
        name
        for name in used_names()
        if name not in named and not any(other.startswith(f"{name}.") for other in named)
    )
    assert missing == [], "add them to NAMES in scripts/ray_contract.py"


def of_the_contract() -> set[str]:
    """Return all members of Ray's classes of which the contract names one."""
    ray = Ray(Installed(site_packages()))
    owners = {Name(name.module, name.name.split(".")[0]) for name in NAMES if "." in name.name}
    return {member for owner in owners for member in members(ray.find(owner))}


def members(found: Found | None) -> Iterator[str]:
    assert found is not None
    assert isinstance(found.node, ast.ClassDef)
    for node in found.node.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


# The files that handle objects of Ray's own classes.
ADAPTERS = ("_ray.py", "ray_callback.py", "ray_instance.py", "slot.py")


def said_in(*files: Path) -> set[str]:
    """Return all attributes and strings."""
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)} | {
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_the_contract_names_all_that_is_used_of_rays_objects() -> None:
    said = said_in(*(PACKAGE / "cluster" / name for name in ADAPTERS))
    named = {name.name.rpartition(".")[2] for name in (*NAMES, *(f.of for f in FEATURES))}
    missing = said & of_the_contract() - named - {"get", "shutdown"}  # of dicts and of vLLM, here
    assert missing == set(), "add them to NAMES in scripts/ray_contract.py"


def test_the_contract_names_nothing_that_is_not_used() -> None:
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    words = set(re.findall(r"\w+", text))
    unused = [str(name) for name in NAMES if name.name.rpartition(".")[2] not in words]
    assert unused == [], "remove them from NAMES in scripts/ray_contract.py"


def test_the_contract_names_each_thing_once() -> None:
    assert len({str(name) for name in NAMES}) == len(NAMES)


def test_the_contract_has_all_of_the_schema() -> None:
    from rayserve_hooks.cluster import ray_schema

    own = {
        name
        for name, value in vars(ray_schema).items()
        if dataclasses.is_dataclass(value) and value.__module__ == ray_schema.__name__
    }
    assert {name for name in own if name[0] != "_"} == SCHEMA.keys()
    named = {str(name) for name in NAMES} | {str(feature.of) for feature in FEATURES}
    for ours, rays in SCHEMA.items():
        for field in dataclasses.fields(getattr(ray_schema, ours)):
            assert f"{rays}.{field.name}" in named


MODULE = "ray/llm/base.py"
CALLBACK = Name("ray.llm.base", "Callback")


def test_a_name_that_has_moved_is_reported_with_its_new_place() -> None:
    files = {MODULE: "", "ray/serve/callbacks.py": "class Callback: ...", "ray/a.py": ""}
    assert problems(files, CALLBACK) == [
        (
            "ray.llm.base.Callback is not there; expected in ray/llm/base.py; found in "
            "ray/serve/callbacks.py"
        )
    ]


def test_a_name_that_is_gone_with_its_module() -> None:
    assert problems({"ray/a.py": ""}, CALLBACK) == [
        (
            "ray.llm.base.Callback is not there; expected in ray/llm/base.py, which is not there "
            "either; found nowhere"
        )
    ]


def test_a_field_that_another_class_has_now() -> None:
    files = {MODULE: "class Callback:\n    x: int\nclass Other:\n    ctx: int"}
    assert problems(files, Name("ray.llm.base", "Callback.ctx")) == [
        (
            "ray.llm.base.Callback.ctx is not there; expected in ray/llm/base.py; found in "
            "ray/llm/base.py itself, elsewhere"
        )
    ]


@pytest.mark.parametrize(
    "source",
    [
        "class Callback: ...",
        "Callback = object",
        "Callback: type = object",
        "from ray.other import Callback",
        "from ray.other import Other as Callback",
        "try:\n    from a import Callback\nexcept ImportError:\n    Callback = None",
        "if True:\n    class Callback: ...",
    ],
)
def test_a_name_may_be_defined_or_imported(source: str) -> None:
    assert problems({MODULE: source}, CALLBACK) == []


def test_a_module_is_a_name_of_its_package() -> None:
    name = Name("ray.llm", "base")
    assert problems({"ray/llm/__init__.py": "", MODULE: ""}, name) == []
    assert problems({"ray/llm/__init__.py": ""}, name) != []


@pytest.mark.parametrize(
    ("definition", "good"),
    [
        ("def run(self, name, other=1): ...", True),
        ("def run(self, first, name): ...", True),
        ("def run(name, self): ...", False),
        ("def run(self): ...", False),
        ("def run(self, *, name): ...", True),
    ],
)
def test_parameters_are_there_and_in_order(definition: str, good: bool) -> None:
    found = problems({MODULE: definition}, Name("ray.llm.base", "run", ("self", "name")))
    assert (found == []) == good
    if not good:
        has = re.findall(r"\((.*)\)", definition)[0]
        assert found == [
            (
                f"ray.llm.base.run takes ({has}) in ray/llm/base.py; expected (self, name) in this "
                "order"
            )
        ]


def test_a_dataclass_takes_its_fields() -> None:
    source = "class Config:\n    a: int\n    '''what a is'''\n    b: int = 0"
    assert problems({MODULE: source}, Name("ray.llm.base", "Config", ("a", "b"))) == []
    assert problems({MODULE: source}, Name("ray.llm.base", "Config", ("b", "a"))) != []


def test_all_other_keyword_arguments() -> None:
    name = Name("ray.llm.base", "f", ("**kwargs",))
    assert problems({MODULE: "def f(**kwargs): ..."}, name) == []
    assert problems({MODULE: "def f(*, a=1): ..."}, name) != []


def test_a_coroutine_function_that_is_none_any_more() -> None:
    name = Name("ray.llm.base", "f", is_async=True)
    assert problems({MODULE: "async def f(): ..."}, name) == []
    assert problems({MODULE: "def f(): ..."}, name) == [
        "ray.llm.base.f is not a coroutine function in ray/llm/base.py"
    ]


def test_an_order_that_has_changed() -> None:
    order = Order(Name("ray.llm.base", "f"), ("first()", "second()"))
    assert problems({MODULE: "def f():\n    first()\n    second()"}, order) == []
    assert problems({MODULE: "def f():\n    second()\n    first()"}, order) == [
        "ray.llm.base.f has another order in ray/llm/base.py; expected 'first()', 'second()'"
    ]
    assert problems({MODULE: "def f():\n    second()"}, order) == [
        "ray.llm.base.f has no 'first()' in ray/llm/base.py"
    ]


def test_the_real_contract_finds_each_name_that_is_taken_away() -> None:
    """Take every file away in turn: whatever is named in it must be reported."""
    real = Installed(site_packages())
    for module in sorted({name.module for name in NAMES if name.module.count(".") > 2}):
        path = f"{module.replace('.', '/')}.py"
        if path not in set(real.names()):
            continue
        files = Files(dict.fromkeys(real.names(), ""))
        wanted = [name for name in NAMES if name.module == module]
        del files[path]
        assert len([x for x in problems(files, *wanted) if "is not there" in x]) == len(wanted)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder for wheels that are fetched already, each with a contract of one name."""
    monkeypatch.setattr(probe, "WHEELS", tmp_path)
    monkeypatch.setattr(probe, "NAMES", [CALLBACK])
    monkeypatch.setattr(probe, "ORDERS", [])
    monkeypatch.setattr(probe, "FEATURES", [])
    return tmp_path


def wheel(folder: Path, version: str, source: str) -> None:
    with zipfile.ZipFile(folder / f"ray-{version}-cp311-cp311-any.whl", "w") as made:
        made.writestr(MODULE, source)


def test_a_tested_ray_must_be_as_expected(wheels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel(wheels, "2.58.1", "class Callback: ...")
    wheel(wheels, "2.59.0", "")
    assert run_probe(["2.58.1"])
    assert not run_probe(["2.58.1", "2.59.0"])
    output = capsys.readouterr().out
    assert "Ray 2.59.0 (tested): 1 problem\n  - ray.llm.base.Callback is not there" in output


def test_a_newer_ray_is_a_warning_with_the_probes_result(
    wheels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel(wheels, "2.60.0", "class Callback: ...")
    wheel(wheels, "2.61.0", "")
    assert run_probe(["2.60.0", "2.61.0"])
    output = capsys.readouterr().out
    assert "warning: Ray 2.61.0 is newer than Ray 2.60, the newest tested one\n" in output
    assert "Ray 2.61.0 (newer than tested): 1 problem\n  - ray.llm.base.Callback is" in output
    assert not run_probe(["2.61.0"]), "asked for by name, it fails"


def test_an_older_ray_may_differ(wheels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel(wheels, "2.51.2", "")
    wheel(wheels, "2.60.0", "class Callback: ...")
    assert run_probe(["2.51.2", "2.60.0"])
    assert "Ray 2.51.2 (older than tested): 1 problem\n" in capsys.readouterr().out


def test_a_minor_means_its_newest_release(wheels: Path) -> None:
    for version in ("2.58.9", "2.58.10"):
        wheel(wheels, version, "")
    assert probe.fetch("2.58")[0] == "2.58.10"


def test_a_feature_that_came_or_went_in_another_minor(monkeypatch: pytest.MonkeyPatch) -> None:
    feature = Feature("a mirror", Name("ray.llm.base", "f"), "mirror", "2.57", "2.60")
    monkeypatch.setattr(probe, "FEATURES", [feature])
    has, has_not = Ray(Files({MODULE: "def f(): mirror"})), Ray(Files({MODULE: "def f(): x"}))
    assert feature_problems(has, "2.57.0") == feature_problems(has_not, "2.60.0") == []
    assert feature_problems(has_not, "2.56.1") == []
    expected = "the feature 'a mirror' (ray.llm.base.f); expected since 2.57, until 2.60"
    assert feature_problems(has, "2.56.1") == [f"has {expected}"]
    assert feature_problems(has_not, "2.58.1") == [f"has not {expected}"]


def test_the_index_gives_the_newest_release_of_each_minor(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    listed = "2.61.0rc1, 2.60.1, 2.60.0, 2.51.2, 2.51.0, 2.50.1"
    output = f"ray (2.60.1)\nAvailable versions: {listed}\n"
    monkeypatch.setattr(
        "subprocess.run", lambda *_, **__: SimpleNamespace(stdout=output, stderr="")
    )
    assert probe.versions_on_index() == ["2.51.2", "2.60.1"]


def test_the_orders_are_of_names_in_the_contract() -> None:
    assert {str(order.of) for order in ORDERS} <= {str(name) for name in NAMES}
    assert ray_contract.FEATURES


def test_a_wheel_is_read_as_an_installed_ray_is(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "ray.whl", "w") as made:
        made.writestr("ray/llm/base.py", "class Callback:\n    ctx: int")
        made.writestr("ray/core/_raylet.so", "")
    assert list(Wheel(tmp_path / "ray.whl").names()) == [MODULE]
    assert Ray(Wheel(tmp_path / "ray.whl")).find(Name("ray.llm.base", "Callback.ctx")) is not None
