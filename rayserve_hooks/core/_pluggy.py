"""The one place that touches what pluggy keeps to itself; `tests/test__pluggy.py` watches it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pluggy

HookFunction = Callable[..., Any]


def replace_function(impl: pluggy.HookImpl, function: HookFunction) -> None:
    """Put ``function`` in the place of an impl's own.

    pluggy offers no interception of single impls: its call monitoring sees a whole hook call.
    The attribute is public, but declared final.
    """
    impl.function = function  # type: ignore[misc]


def reverse_groups(caller: pluggy.HookCaller, *marks: str) -> None:
    """Reverse the run order within some groups of a hook's impls, wrappers and others apart.

    pluggy runs the last registered first, except among ``trylast`` impls, where the first
    registered runs first. A list registered from its end to its start therefore runs in list
    order but for the ``trylast`` group. ``HookCaller._hookimpls`` is the list pluggy calls from
    its end; there is no public way to reorder it.

    Args:
        caller: The hook.
        *marks: Which groups: ``"tryfirst"``, ``"trylast"`` or ``""``, the unmarked.
    """
    impls = caller._hookimpls
    for mark in marks:
        for wrapper in (True, False):
            places = [i for i, impl in enumerate(impls) if _group(impl) == (mark, wrapper)]
            group = [impls[i] for i in places]
            for place, impl in zip(places, reversed(group), strict=True):
                impls[place] = impl


def _group(impl: pluggy.HookImpl) -> tuple[str, bool]:
    mark = "tryfirst" if impl.tryfirst else "trylast" if impl.trylast else ""
    return mark, impl.wrapper or impl.hookwrapper
