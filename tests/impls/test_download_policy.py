import pytest

from rayserve_hooks import CallbackCtx, NodeModelDownloadable
from rayserve_hooks.context import NodeInfo
from rayserve_hooks.errors import CallbackConfigError
from rayserve_hooks.impls.download_policy import DownloadPolicy

LOCAL = NodeInfo("n1", "10.0.0.1", is_local=True)
OTHER = NodeInfo("n2", "10.0.0.2", is_local=False)


def ctx_on(node: NodeInfo) -> CallbackCtx:
    return CallbackCtx(llm_config=lambda: None, node=node)  # type: ignore[arg-type, return-value]


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
        DownloadPolicy(nodes={"n2": "ALL"})
