"""``rayserve-hooks doctor``: what can be known before a deployment, here and on each node."""

from __future__ import annotations

import argparse

from rayserve_hooks.cli import configs
from rayserve_hooks.cli.output import DoctorRow, as_json, table
from rayserve_hooks.cluster import doctor


def run(options: argparse.Namespace) -> tuple[str, int]:
    """Return what the command prints, and its exit code."""
    deployments = configs.read(options.config)
    lines = doctor.examine("this machine", deployments, on_cluster=False)
    if options.cluster or options.address or options.node:
        from rayserve_hooks.cluster import nodes

        with nodes.connected(options.address, options.working_dir):
            lines += nodes.examine_nodes(deployments, options.node)
    rows = [
        DoctorRow(
            node=line.node,
            deployment=line.deployment,
            subject=line.finding.subject,
            state=line.finding.state,
            detail=line.finding.detail,
            advice=line.finding.advice,
        )
        for line in lines
    ]
    code = int(any(row["state"] == "problem" for row in rows))
    return (as_json(rows) if options.json else _text(rows)), code


def _text(rows: list[DoctorRow]) -> str:
    """Return a part for each machine, each with its lines."""
    parts = []
    for node in dict.fromkeys(row["node"] for row in rows):
        lines = [
            {
                "state": row["state"],
                "of": row["deployment"],
                "subject": row["subject"],
                "found; what to do": "; ".join(filter(None, [row["detail"], row["advice"]])),
            }
            for row in rows
            if row["node"] == node
        ]
        parts.append(f"{node}\n{table(lines, '')}")
    states = [row["state"] for row in rows]
    parts.append(f"{states.count('problem')} problems, {states.count('warning')} warnings")
    return "\n\n".join(parts)
