"""The one place that touches pluggy's internals; `tests/core/test__pluggy.py` watches them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import pluggy

UNDECORATED: pluggy.HookimplOpts = vars(pluggy.HookimplMarker("any")(lambda: None))["any_impl"]
"""What ``@hookimpl`` without arguments gives a method."""


def impl_options(marked: object, project: str) -> pluggy.HookimplOpts | None:
    """Return what ``@hookimpl(...)`` has left on a function, or None.

    pluggy's own look-up binds the attribute first, which runs properties before pluggy 1.7.
    """
    options = getattr(marked, f"{project}_impl", None)
    # pluggy fills in what is not said; a mock has something under each name.
    return {**UNDECORATED, **options} if isinstance(options, dict) else None


def spec_options(marked: object, project: str) -> Mapping[str, Any]:
    """Return what ``@hookspec(...)`` has left on a function."""
    options: Mapping[str, Any] = getattr(marked, f"{project}_spec")
    return options


def note_distribution(
    manager: pluggy.PluginManager, plugin: object, distribution: importlib.metadata.Distribution
) -> None:
    """Have ``list_plugin_distinfo`` name the distribution of a plugin."""
    noted: Any = distribution
    if not hasattr(manager, "list_plugin_distributions"):  # before pluggy 1.7
        from pluggy._manager import DistFacade  # type: ignore[attr-defined] # it moved later

        noted = DistFacade(distribution)
    manager._plugin_distinfo.append((plugin, noted))  # noqa: SLF001 - no other way to add one


def reverse_groups(caller: pluggy.HookCaller, *marks: str) -> None:
    """Reverse ``"tryfirst"``, ``"trylast"`` or ``""`` (unmarked) impls, wrappers apart from others.

    pluggy runs the last registered first, except among ``trylast`` impls, where the first
    registered runs first. A list registered from its end to its start therefore runs in list
    order but for the ``trylast`` group. ``HookCaller._hookimpls`` is the list pluggy calls from
    its end; there is no public way to reorder it.
    """
    impls = caller._hookimpls  # noqa: SLF001 - see above
    for mark in marks:
        for wrapper in (True, False):
            places = [i for i, impl in enumerate(impls) if _group(impl) == (mark, wrapper)]
            group = [impls[i] for i in places]
            for place, impl in zip(places, reversed(group), strict=True):
                impls[place] = impl


def _group(impl: pluggy.HookImpl) -> tuple[str, bool]:
    mark = "tryfirst" if impl.tryfirst else "trylast" if impl.trylast else ""
    return mark, impl.wrapper or impl.hookwrapper
