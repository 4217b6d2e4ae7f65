"""What vLLM loads in every process of an engine, by the entry point of its general plugins.

vLLM does so in any program that uses it on a machine where this package is installed, so nothing
is imported, and nothing happens, unless the environment has the mark of a start.
"""

from __future__ import annotations

import os

MARK = "RAYSERVE_HOOKS_ENGINE_START"
"""The environment variable by which a process of the engine knows its start: a token and a node."""


def run_hooks() -> None:
    """Run ``on_before_engine_init``, if this is a process of an engine whose start has it.

    Raises:
        HookError: A callback has failed.
    """
    mark = os.environ.get(MARK)
    if mark:
        from rayserve_hooks.cluster.engine_process import run_hooks_here

        run_hooks_here(mark)
