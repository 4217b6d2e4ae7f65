"""Choose what each node downloads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import PlainValidator, WithJsonSchema

from rayserve_hooks.context import CallbackCtx, DownloadMode, NodeModelDownloadable
from rayserve_hooks.core.arguments import checked_arguments

Mode = Annotated[
    DownloadMode,
    PlainValidator(NodeModelDownloadable.parse),
    WithJsonSchema({"enum": sorted(NodeModelDownloadable.__members__)}),
]


class DownloadPolicy:
    """Set the download modes: for the replica's own node, the others, and single nodes.

    A mode is one of Ray's four: ``MODEL_AND_TOKENIZER``, ``TOKENIZER_ONLY``,
    ``EXCLUDE_SAFETENSORS`` or ``NONE``.

    Args:
        local: Mode of the replica's own node. Default: None, which leaves it as it is.
        workers: Mode of every other node of the placement group. Default: None, which leaves it as
            it is.
        nodes: Modes of single nodes, by node id or IP address; they win over the two above.
            Default: None, for no single node.

    Raises:
        CallbackConfigError: An argument is wrong; the message names each one.
    """

    @checked_arguments
    def __init__(
        self,
        local: Mode | None = None,
        workers: Mode | None = None,
        nodes: Mapping[str, Mode] | None = None,
    ) -> None:
        self.local = local
        self.workers = workers
        self.nodes = dict(nodes or {})

    def on_before_init(self, ctx: CallbackCtx) -> None:
        if self.local is not None:
            ctx.local_node_download_model = self.local
        if self.workers is not None:
            ctx.worker_node_download_model = self.workers

    def on_before_download(self, ctx: CallbackCtx) -> None:
        mode = self.nodes.get(ctx.node.id) or self.nodes.get(ctx.node.address)
        if mode is None:
            return
        if ctx.node.is_local:
            ctx.local_node_download_model = mode
        else:
            ctx.worker_node_download_model = mode
