"""For authors of callbacks: a whole start of a replica, simulated in milliseconds.

Opt in, in a ``conftest.py``::

    pytest_plugins = ["rayserve_hooks.testing"]

and ask for the fixture `run_stack`. Neither Ray nor vLLM is needed, nor imported.

PYTEST_DONT_REWRITE: nothing is asserted here, and a test may have imported it already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from rayserve_hooks.testing.cluster import Group
from rayserve_hooks.testing.config import LoraConfig, ModelConfig
from rayserve_hooks.testing.engine import Engine
from rayserve_hooks.testing.outcome import Outcome
from rayserve_hooks.testing.run import simulate
from rayserve_hooks.testing.steps import Fail, Hang, Kill, Step, TakeOver
from rayserve_hooks.testing.store import Store
from rayserve_hooks.testing.travel import sent

__all__ = [
    "Engine",
    "Fail",
    "Group",
    "Hang",
    "Kill",
    "LoraConfig",
    "ModelConfig",
    "Outcome",
    "RunStack",
    "ServeModels",
    "Step",
    "Store",
    "TakeOver",
    "run_stack",
    "sent",
    "serve_models",
]


class RunStack(Protocol):
    """The type of the fixture `run_stack`."""

    def __call__(
        self,
        callbacks: object = (),
        config: Any = None,
        *,
        nodes: int = 1,
        engine_processes: Sequence[str] | None = None,
        engine: Any = None,
        time_limits: Mapping[str, float | None] | None = None,
        on_error: str = "raise",
        installed: Mapping[str, str] | Sequence[str] | bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Run a stack from the build of its app to the end of its replica, on simulated nodes.

        The path, the manager, order, background work, limits, failure and clean-up are the real
        ones. Whatever would travel between processes is pickled and built anew. All processes
        share one interpreter: what a callback keeps on its class or in its module is in all of
        them, and `Outcome.shared` names what it has changed there. Nodes run at once: after a
        failure it depends on the moment how far the others had come.

        Args:
            callbacks: One callback or a list of them, as ``LLMConfig`` takes it.
            config: A `ModelConfig`, by default an empty one, or a real ``LLMConfig``, which has
                to be imported. Without ``callbacks`` a real one's are run.
            nodes: How many there are: ``"node-1"``, the replica's own, ``"node-2"``, ...
            engine_processes: The engine's processes besides the replica, such as
                ``["engine core", "worker 0", "worker 1"]``; by default a core and, where there is
                more than one node, a worker on each.
            engine: A stand-in for vLLM's client; by default an `Engine`.
            time_limits: As ``LLMConfig`` takes them.
            on_error: What a callback that does not say does when it fails.
            installed: Which short names are found: none, all that is installed (True), some of
                it, or a mapping from names to ``"pkg.module:Class"`` instead.
            environment: Variables that are set meanwhile.

        Returns:
            What has happened; a failure does not raise.

        Raises:
            CallbackConfigError: The callbacks are refused where a config is made.
        """


@pytest.fixture
def run_stack(tmp_path: Path) -> RunStack:
    """Run a stack of callbacks on simulated nodes; see `RunStack`."""
    own = {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "RAYSERVE_HOOKS_LOCK_DIR": str(tmp_path / "locks"),
        "RAYSERVE_HOOKS_PROGRESS": "0",
    }

    def run(*args: Any, environment: Mapping[str, str] | None = None, **kwargs: Any) -> Outcome:
        return simulate(*args, environment={**own, **(environment or {})}, **kwargs)

    return run


ServeModels = Callable[[Path], Store]


@pytest.fixture
def serve_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServeModels]:
    """Serve a folder as an S3 bucket on loopback, which the environment names as the endpoint."""
    with ExitStack() as stack:

        def serve(folder: Path) -> Store:
            store = stack.enter_context(Store(folder).serving())
            for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
                monkeypatch.delenv(name, raising=False)
            monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
            return store

        yield serve
