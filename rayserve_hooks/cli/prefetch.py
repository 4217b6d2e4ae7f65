"""``rayserve-hooks prefetch``: the models are on the nodes before the first replica."""

from __future__ import annotations

import argparse
import sys

from rayserve_hooks.cli import configs
from rayserve_hooks.cli.output import PrefetchRow, as_json, table
from rayserve_hooks.cluster import nodes
from rayserve_hooks.cluster.prefetch import Prefetched, prefetch
from rayserve_hooks.context import NodeModelDownloadable


def run(options: argparse.Namespace) -> tuple[str, int]:
    """Return what the command prints, and its exit code."""
    deployments = configs.read(options.config)
    bars = sys.stderr.isatty()
    with nodes.connected(options.address, options.working_dir, show_logs=bars):
        done = prefetch(
            deployments,
            options.node,
            NodeModelDownloadable.parse(options.mode) if options.mode else None,
            on_progress=_say,
            variables={"RAYSERVE_HOOKS_PROGRESS": "1"} if bars else {},
        )
    for found in done:
        if found.error is not None:
            _say(f"{found.deployment}: {found.error}")
    rows = [_row(found) for found in done]
    code = int(not all(row["ok"] for row in rows))
    return (as_json(rows) if options.json else table(_short(rows), "no nodes")), code


def _say(line: str) -> None:
    print(f"rayserve-hooks: {line}", file=sys.stderr, flush=True)


def _row(found: Prefetched) -> PrefetchRow:
    result = found.result
    return PrefetchRow(
        deployment=found.deployment,
        node=found.node.id,
        address=found.node.address,
        ok=found.error is None,
        model_path=result.model_path if result else None,
        callback=result.handled.callback if result and result.handled else "",
        hook_s=round(result.hook_s, 3) if result else 0.0,
        download_s=round(result.download_s, 3) if result else 0.0,
        error="" if found.error is None else str(found.error),
    )


def _short(rows: list[PrefetchRow]) -> list[dict[str, object]]:
    """Return the rows as people read them; errors stand above, whole."""
    return [
        {
            "state": "ready" if row["ok"] else "failed",
            "deployment": row["deployment"],
            "node": row["address"],
            "seconds": f"{row['hook_s'] + row['download_s']:.1f}",
            "brought by": row["callback"] or ("the download" if row["model_path"] else ""),
            "model": row["model_path"] or "",
        }
        for row in rows
    ]
