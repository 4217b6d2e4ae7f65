"""A callback for tests of deployments of several replicas; importable in every process."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rayserve_hooks import CallbackCtx


class Note:
    """Write a file of this replica, once its nodes are ready: what it is, and what they are."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_after_init(self, ctx: CallbackCtx) -> None:
        from ray import serve

        replica = serve.get_replica_context()
        assert ctx.placement_group is not None
        note = {
            "deployment": replica.deployment,
            "replica": replica.replica_id.unique_id,
            "rank": str(getattr(replica.rank, "rank", replica.rank)),
            "pid": os.getpid(),
            "nodes": list(ctx.nodes),
            "bundles": ctx.placement_group.bundle_count,
            "callbacks": sorted({entry.callback for entry in ctx.trace}),
        }
        partial = self.folder / f"{os.getpid()}.partial"
        partial.write_text(json.dumps(note))
        partial.rename(partial.with_suffix(".json"))
