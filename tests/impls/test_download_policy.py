import enum
import re
from typing import Any

import pytest

from rayserve_hooks import CallbackCtx, NodeModelDownloadable
from rayserve_hooks.context import NodeInfo
from rayserve_hooks.errors import CallbackConfigError
from rayserve_hooks.impls.download_policy import DownloadPolicy

LOCAL = NodeInfo("n1", "10.0.0.1", is_local=True)
OTHER = NodeInfo("n2", "10.0.0.2", is_local=False)


def ctx_on(node: NodeInfo) -> CallbackCtx:
    return CallbackCtx(llm_config=None, node=node)


def test_modes_of_the_replicas_node_and_the_others() -> None:
    ctx = ctx_on(LOCAL)
    DownloadPolicy(local="NONE", workers="TOKENIZER_ONLY").on_before_init(ctx)
    assert ctx.local_node_download_model is NodeModelDownloadable.NONE
    assert ctx.worker_node_download_model is NodeModelDownloadable.TOKENIZER_ONLY


def test_what_is_not_named_stays() -> None:
    ctx = ctx_on(LOCAL)
    ctx.worker_node_download_model = "NONE"
    DownloadPolicy(local="TOKENIZER_ONLY").on_before_init(ctx)
    assert ctx.worker_node_download_model is NodeModelDownloadable.NONE


@pytest.mark.parametrize("key", ["id", "address"])
@pytest.mark.parametrize("node", [LOCAL, OTHER])
def test_single_nodes_by_id_or_address(key: str, node: NodeInfo) -> None:
    ctx = ctx_on(node)
    policy = DownloadPolicy(nodes={getattr(node, key): "EXCLUDE_SAFETENSORS"})
    policy.on_before_init(ctx)
    policy.on_before_download(ctx)
    mode = ctx.local_node_download_model if node.is_local else ctx.worker_node_download_model
    assert mode is NodeModelDownloadable.EXCLUDE_SAFETENSORS


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
