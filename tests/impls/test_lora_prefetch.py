from __future__ import annotations

import asyncio
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3
from plugins_for_tests import make_ctx
from users import ALICE, needs_root

from rayserve_hooks.cluster import _ray
from rayserve_hooks.errors import CallbackConfigError
from rayserve_hooks.impls.lora_prefetch import LoraPrefetch
from rayserve_hooks.testing import LoraConfig, ModelConfig, Outcome, RunStack

URI = "s3://anonymous@bucket/loras"
NAMES = [f"adapter-{number}" for number in range(12)]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in place of that of Ray's loader, which is one for the whole node."""
    root = tmp_path / "lora" / "cache"
    monkeypatch.setattr(_ray, "adapter_folder", lambda config, name: str(root / name))
    return root


@pytest.fixture
def store(tmp_path: Path, clean: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Server]:
    for name in NAMES:
        folder = tmp_path / "buckets" / "bucket" / "loras" / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(name.encode())
    (tmp_path / "buckets" / "bucket" / "loras" / "notes").mkdir()
    (tmp_path / "buckets" / "bucket" / "loras" / "notes" / "todo.txt").write_text("no adapter")
    with s3.serving(tmp_path / "buckets") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


def run(
    run_stack: RunStack, uri: str = URI, nodes: int = 1, model_id: str = "tiny", **arguments: Any
) -> Outcome:
    config = ModelConfig(model_id, lora_config=LoraConfig(uri))
    return run_stack({"callback": LoraPrefetch, "kwargs": arguments}, config, nodes=nodes)


def held(root: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in root.glob("*/*.safetensors")}


def test_all_adapters_of_the_path_are_on_the_node(
    run_stack: RunStack, store: s3.Server, root: Path
) -> None:
    run(run_stack).assert_succeeded()
    assert held(root) == {name: name for name in NAMES}
    assert not (root / "notes").exists()


def test_named_ones_alone(run_stack: RunStack, store: s3.Server, root: Path) -> None:
    run(run_stack, adapters=NAMES[:2]).assert_succeeded()
    assert set(held(root)) == set(NAMES[:2])


def test_they_are_fetched_several_at_once(
    run_stack: RunStack, store: s3.Server, root: Path
) -> None:
    store.first_byte_s = 0.05
    run(run_stack, adapters=NAMES, parallel_adapters=12).assert_succeeded()
    first_get = next(i for i, r in enumerate(store.requests) if r.startswith("GET"))
    # One after the other, the second would be listed after the first is there.
    listed = [r for r in store.requests[:first_get] if r.startswith("LIST")]
    assert len(listed) > 1


def test_other_nodes_get_what_the_replica_has_found(
    run_stack: RunStack, store: s3.Server, root: Path
) -> None:
    outcome = run(run_stack, nodes=2).assert_succeeded()
    found, *fetched = sorted(outcome.logged("LoraPrefetch"))
    assert found == f"INFO: 12 adapters of tiny: {', '.join(sorted(NAMES))}"
    assert len(fetched) == 2 * len(NAMES)  # of both nodes, which have one disk here
    shutil.rmtree(root)
    other = make_ctx(custom_data=outcome.custom_data)  # its config is not loaded
    LoraPrefetch().on_before_download(other)
    assert set(held(root)) == set(NAMES)


def test_one_that_is_missing_is_a_warning_and_the_others_are_there(
    run_stack: RunStack, store: s3.Server, root: Path
) -> None:
    outcome = run(run_stack, adapters=["nope", *NAMES[:2]]).assert_succeeded()
    assert set(held(root)) == set(NAMES[:2])
    text = f"an adapter cannot be served: {URI}/nope/ holds no object; check bucket and path"
    warned = [line for line in outcome.log if line.startswith("WARNING")]
    assert warned == [f"WARNING: LoraPrefetch: {text}"]


def test_required_ones_end_the_start(run_stack: RunStack, store: s3.Server, root: Path) -> None:
    outcome = run(run_stack, adapters=["nope"], required=True)
    outcome.assert_failed("nope/ holds no object", callback="LoraPrefetch")


def test_a_bucket_that_is_gone_is_a_warning(
    run_stack: RunStack, store: s3.Server, root: Path
) -> None:
    outcome = run(run_stack, "s3://anonymous@gone/loras").assert_succeeded()
    (line,) = outcome.logged("LoraPrefetch")
    text = "an adapter cannot be served: cannot list s3://anonymous@gone/loras"
    assert line.startswith(f"WARNING: {text}")


@pytest.mark.parametrize("lora_config", [None, LoraConfig()])
def test_a_config_without_adapters_is_said(
    run_stack: RunStack, root: Path, lora_config: LoraConfig | None
) -> None:
    outcome = run_stack(LoraPrefetch, ModelConfig(lora_config=lora_config))
    outcome.assert_failed("has no lora_config with a dynamic_lora_loading_path; set")


def test_a_folder_that_cannot_be_made_is_a_warning(
    run_stack: RunStack, store: s3.Server, root: Path
) -> None:
    root.parent.write_text("in the way")
    outcome = run(run_stack, adapters=NAMES[:1]).assert_succeeded()
    why = f"[Errno 20] Not a directory: '{root.parent}'; make"
    text = f"on node node-1 (10.0.0.1) cannot be made: {why}"
    assert text in "".join(outcome.logged("LoraPrefetch"))


def test_a_folder_that_others_may_write_is_refused(
    run_stack: RunStack, store: s3.Server, root: Path
) -> None:
    (root / NAMES[0]).mkdir(parents=True)
    (root / NAMES[0]).chmod(0o777)
    outcome = run(run_stack, adapters=NAMES[:1])
    outcome.assert_failed(r"can be written by others \(mode 0o777\); remove it, or")


@needs_root
@pytest.mark.parametrize("planted", ["", "adapter-0", "adapter-0/adapter_model.bin"])
def test_what_another_user_has_planted_is_refused(
    run_stack: RunStack, planted: str, store: s3.Server, root: Path
) -> None:
    path = root / planted
    if planted.endswith(".bin"):
        path.parent.mkdir(parents=True)
        path.write_text("evil")
    else:
        path.mkdir(parents=True)
    os.chown(path, ALICE, ALICE)
    outcome = run(run_stack, adapters=NAMES[:1])
    outcome.assert_failed(f"{re.escape(str(path))}' belongs to user {ALICE}")


@pytest.mark.ray
def test_rays_own_loader_has_them_in_the_same_folder(
    run_stack: RunStack, store: s3.Server, tmp_path: Path
) -> None:
    from ray.llm._internal.serve.utils.lora_serve_utils import LoraModelLoader

    # Its folder is one for the whole machine, and so the name is new each time.
    name = f"adapter-{uuid.uuid4().hex}"
    (tmp_path / "buckets/bucket/loras/adapter-0").rename(tmp_path / f"buckets/bucket/loras/{name}")
    outcome = run(run_stack, model_id="org/tiny", adapters=[name]).assert_succeeded()
    (folder,) = outcome.custom_data["lora_prefetch"].values()
    try:
        assert (Path(folder) / "adapter_model.safetensors").read_text() == "adapter-0"
        store.requests.clear()
        loading = LoraModelLoader().load_model_from_config(f"org/tiny:{name}", outcome.config)
        assert asyncio.run(loading).local_path == folder
        # What docs/callbacks.md says of it; once a Ray does not, a request no longer waits.
        assert f"GET bucket/loras/{name}/adapter_model.safetensors" in store.requests
    finally:
        shutil.rmtree(folder)
        Path(f"{folder}.lock").unlink(missing_ok=True)  # of Ray's loader


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"adapters": "one"}, "(adapters='one'): write a list, even of one item"),
        ({"adapters": ["../up"]}, "(adapters[0]='../up'): write the name of a folder"),
        ({"adapters": [".."]}, "(adapters[0]='..'): write the name of a folder"),
        ({"parallel_adapters": 0}, "(parallel_adapters=0): write at least 1"),
        ({"required": "maybe"}, "(required='maybe'): write true or false"),
        ({"adapter": ["x"]}, " has unknown argument 'adapter'; did you mean 'adapters'?"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(CallbackConfigError, match=f"^LoraPrefetch{re.escape(text)}"):
        LoraPrefetch(**arguments)
