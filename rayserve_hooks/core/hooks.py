"""What follows from the hookspecs: names, parameters, phases."""

from __future__ import annotations

import inspect
from types import MappingProxyType

from rayserve_hooks.core import _pluggy
from rayserve_hooks.errors import Phase
from rayserve_hooks.hookspecs import PROJECT, RayServeLLMCallback

_SPECS = {name: spec for name, spec in vars(RayServeLLMCallback).items() if name.startswith("on_")}

HOOKS = tuple(_SPECS)
"""The hooks' names, in the order in which an initialization calls them."""

HOOK_PARAMETERS = MappingProxyType(
    {name: tuple(inspect.signature(spec).parameters)[1:] for name, spec in _SPECS.items()}
)
"""By hook, what it is called with; an implementation may leave out all but ``ctx``."""

FIRST_RESULT = tuple(
    name for name, spec in _SPECS.items() if _pluggy.spec_options(spec, PROJECT)["firstresult"]
)
"""Of these the first result that is not None ends the chain."""

CLEAN_UP = "on_init_failed"
"""Its callbacks run in reverse, all of them, and what fails in them is collected."""

PHASES = MappingProxyType(
    {
        "on_before_init": Phase.BEFORE_INIT,
        "on_before_download": Phase.BEFORE_DOWNLOAD,
        "on_after_init": Phase.AFTER_INIT,
        CLEAN_UP: Phase.CLEAN_UP,
    }
)
"""By hook, the phase in which it runs."""


def is_inherited_spec(found: object) -> bool:
    """Return whether a class attribute is `RayServeLLMCallback`'s own empty method."""
    return any(found is spec for spec in _SPECS.values())
