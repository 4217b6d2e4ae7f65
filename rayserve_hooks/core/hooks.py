"""What follows from the hookspecs: names, parameters, phases."""

from __future__ import annotations

import inspect
from types import MappingProxyType

from rayserve_hooks.core import _pluggy
from rayserve_hooks.errors import Phase
from rayserve_hooks.hookspecs import PROJECT, RayServeLLMCallback

_SPECS = {name: spec for name, spec in vars(RayServeLLMCallback).items() if name.startswith("on_")}

HOOKS = tuple(_SPECS)
"""The hooks' names, in the order in which a replica's life calls them."""

HOOK_PARAMETERS = MappingProxyType(
    {name: tuple(inspect.signature(spec).parameters)[1:] for name, spec in _SPECS.items()}
)
"""By hook, what it is called with; an implementation may leave out all but ``ctx``."""

FIRST_RESULT = tuple(
    name for name, spec in _SPECS.items() if _pluggy.spec_options(spec, PROJECT)["firstresult"]
)
"""Of these the first result that is not None ends the chain."""

CONFIGURE = "on_configure"
ENGINE_PROCESS = "on_before_engine_init"
ENGINE_READY = "on_engine_ready"
SHUTDOWN = "on_shutdown"
CLEAN_UP = "on_init_failed"

REVERSED = (SHUTDOWN, CLEAN_UP)
"""Their callbacks run in reverse, all of them, and what fails in them is collected."""

PHASES = MappingProxyType(
    {
        CONFIGURE: Phase.CONFIGURE,
        "on_before_init": Phase.BEFORE_INIT,
        "on_before_download": Phase.BEFORE_DOWNLOAD,
        "on_after_init": Phase.AFTER_INIT,
        ENGINE_PROCESS: Phase.BEFORE_ENGINE_INIT,
        ENGINE_READY: Phase.ENGINE_READY,
        SHUTDOWN: Phase.SHUTDOWN,
        CLEAN_UP: Phase.CLEAN_UP,
    }
)
"""By hook, the phase in which it runs."""


RUNS_IN = MappingProxyType(
    {
        CONFIGURE: "where the app is built",
        "on_before_init": "the replica",
        "on_before_download": "every node of the replica",
        "on_after_init": "the replica",
        ENGINE_PROCESS: "every process of the engine",
        ENGINE_READY: "the replica",
        SHUTDOWN: "the replica",
        CLEAN_UP: "each node that had started, then the replica",
    }
)
"""By hook, where it runs."""

NEED_ENGINE = (ENGINE_PROCESS, ENGINE_READY, SHUTDOWN, CLEAN_UP)
"""Of these our own engine class runs the hook, or its part after the nodes are ready."""


def is_inherited_spec(found: object) -> bool:
    """Return whether a class attribute is `RayServeLLMCallback`'s own empty method."""
    return any(found is spec for spec in _SPECS.values())
