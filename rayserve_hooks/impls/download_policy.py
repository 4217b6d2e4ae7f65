"""Choose what each node downloads."""

from collections.abc import Mapping

from rayserve_hooks.context import CallbackCtx, DownloadMode, NodeModelDownloadable
from rayserve_hooks.errors import CallbackConfigError


class DownloadPolicy:
    """Set the download modes: for the replica's own node, the others, and single nodes.

    Args:
        local: Mode of the replica's own node; None leaves it as it is.
        workers: Mode of every other node of the placement group; None leaves it as it is.
        nodes: Modes of single nodes, by node id or IP address; they win over the two above.

    Raises:
        CallbackConfigError: A mode is none of Ray's four; names the argument.
    """

    def __init__(
        self,
        local: DownloadMode | None = None,
        workers: DownloadMode | None = None,
        nodes: Mapping[str, DownloadMode] | None = None,
    ) -> None:
        self.local = _mode("local", local)
        self.workers = _mode("workers", workers)
        self.nodes = {name: _mode(f"nodes[{name!r}]", mode) for name, mode in (nodes or {}).items()}

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


def _mode(argument: str, value: DownloadMode | None) -> NodeModelDownloadable | None:
    if value is None:
        return None
    try:
        return NodeModelDownloadable.parse(value)
    except ValueError as error:
        raise CallbackConfigError(f"DownloadPolicy({argument}=...): {error}") from None
