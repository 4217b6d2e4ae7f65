import enum
import re
from typing import Any

import pytest

from rayserve_hooks import NodeModelDownloadable
from rayserve_hooks.errors import CallbackConfigError
from rayserve_hooks.impls.download_policy import DownloadPolicy
from rayserve_hooks.testing import RunStack


def modes_set(run_stack: RunStack, node: str, **arguments: Any) -> list[tuple[str, str]]:
    """Return the fields that it sets on a node of two, and to what."""
    policy = {"callback": DownloadPolicy, "kwargs": arguments}
    outcome = run_stack(policy, nodes=2).assert_succeeded()
    changes = (change for call in outcome.calls(node=node) for change in call.changes)
    return [(change.path, change.after) for change in changes]


def test_modes_of_the_replicas_node_and_the_others(run_stack: RunStack) -> None:
    assert modes_set(run_stack, "node-1", local="NONE", workers="TOKENIZER_ONLY") == [
        ("local_node_download_model", shown("NONE")),
        ("worker_node_download_model", shown("TOKENIZER_ONLY")),
    ]


def test_what_is_not_named_stays(run_stack: RunStack) -> None:
    assert modes_set(run_stack, "node-1", local="TOKENIZER_ONLY") == [
        ("local_node_download_model", shown("TOKENIZER_ONLY"))
    ]


@pytest.mark.parametrize("node", ["node-1", "node-2", "10.0.0.1", "10.0.0.2"])
def test_single_nodes_by_id_or_address(run_stack: RunStack, node: str) -> None:
    here, other = f"node-{node[-1]}", f"node-{3 - int(node[-1])}"
    field = "local" if here == "node-1" else "worker"
    nodes = {node: "EXCLUDE_SAFETENSORS"}
    assert modes_set(run_stack, here, nodes=nodes) == [
        (f"{field}_node_download_model", shown("EXCLUDE_SAFETENSORS"))
    ]
    assert modes_set(run_stack, other, nodes=nodes) == []


def shown(mode: str) -> str:
    return repr(NodeModelDownloadable[mode])


def test_a_wrong_mode_names_the_argument() -> None:
    with pytest.raises(CallbackConfigError, match=r"DownloadPolicy\(nodes\['n2'\]=...\): 'ALL' is"):
        DownloadPolicy(nodes={"n2": "ALL"})  # type: ignore[dict-item]


MODES = "use one of EXCLUDE_SAFETENSORS, MODEL_AND_TOKENIZER, NONE, TOKENIZER_ONLY"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"nodes": ["x"]}, "(nodes=['x']): write a mapping"),
        ({"nodes": "x"}, "(nodes='x'): write a mapping"),
        ({"nodes": {10: "NONE"}}, "(nodes) has key 10; write a string"),
        ({"nodes": {"n2": None}}, f"(nodes['n2']=...): None is not a download mode; {MODES}"),
        ({"local": True}, f"(local=...): True is not a download mode; {MODES}"),
        ({"workers": ["NONE"]}, f"(workers=...): ['NONE'] is not a download mode; {MODES}"),
        ({"lokal": "NONE"}, " has unknown argument 'lokal'; did you mean 'local'?"),
        ({"zzz": "NONE"}, " has unknown argument 'zzz'; use one of local, nodes, workers"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(CallbackConfigError, match=f"^DownloadPolicy{re.escape(text)}$"):
        DownloadPolicy(**arguments)


def test_all_wrong_arguments_are_reported_together() -> None:
    with pytest.raises(CallbackConfigError, match=r"^3 problems:") as caught:
        DownloadPolicy(local="ALL", nodes={"n2": "NONE", "n3": "all"}, zzz=1)  # type: ignore[arg-type, call-arg, dict-item]
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "DownloadPolicy(local=...)",
        "DownloadPolicy(nodes['n3']=...)",
        "DownloadPolicy has unknown argument 'zzz'; use one of local, nodes, workers",
    ]


def test_a_member_is_as_good_as_its_name() -> None:
    class Mode(enum.Enum):  # as Ray's own
        NONE = "NONE"

    policy = DownloadPolicy(local=Mode.NONE, workers=NodeModelDownloadable.NONE)
    assert policy.local is policy.workers is NodeModelDownloadable.NONE
