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


def reverse_trylast(caller: pluggy.HookCaller) -> None:
    """Reverse the run order of a hook's ``trylast`` impls, wrappers and others apart.

    pluggy runs the last registered first, except among ``trylast`` impls, where the first
    registered runs first. A list registered from its end to its start therefore runs in list
    order but for these. ``HookCaller._hookimpls`` is the list pluggy calls from its end; there
    is no public way to reorder it.
    """
    impls = caller._hookimpls
    for in_group in (_is_trylast_wrapper, _is_plain_trylast):
        places = [i for i, impl in enumerate(impls) if in_group(impl)]
        group = [impls[i] for i in places]
        for place, impl in zip(places, reversed(group), strict=True):
            impls[place] = impl


def _is_trylast_wrapper(impl: pluggy.HookImpl) -> bool:
    return impl.trylast and (impl.wrapper or impl.hookwrapper)


def _is_plain_trylast(impl: pluggy.HookImpl) -> bool:
    return impl.trylast and not (impl.wrapper or impl.hookwrapper)
