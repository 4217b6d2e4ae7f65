"""The contract: every hook, when and where it runs, and what each result does.

A callback is any class with at least one of these hooks::

    class MyCallback:
        def __init__(self, bucket: str) -> None:
            self.bucket = bucket

        @hookimpl(tryfirst=True)
        def on_before_init(self, ctx: CallbackCtx) -> None:
            ctx.extra_init_kwargs["max_model_len"] = 4096

        async def on_before_download(self, ctx: CallbackCtx) -> Handled | None:
            return Handled(model_path=await fetch(self.bucket))
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Generator
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import pluggy

if TYPE_CHECKING:
    from rayserve_hooks.context import CallbackCtx, Handled

PROJECT = "rayserve_hooks"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

T = TypeVar("T")

HookResult: TypeAlias = T | Awaitable[T] | Generator[None, Any, T]
"""What a hook with the result ``T`` may return: of a ``def``, an ``async def`` or a wrapper."""


class RayServeLLMCallback:
    """A callback: any object with at least one of these methods.

    Subclassing is never needed; it gives editors and type checkers the signatures. Each method
    may be ``def`` or ``async def``. ``@hookimpl(tryfirst=True)``, ``trylast=True`` and
    ``wrapper=True`` mean what they mean in pluggy. A callback is built once in every process
    that needs it, so its constructor should be light: open clients in the hooks.
    """

    @hookspec(firstresult=True)
    def on_before_init(self, ctx: CallbackCtx) -> HookResult[Handled | None]:
        """Prepare, or take over, the initialization of all nodes.

        When: first, before anything is placed or downloaded.
        Where: in the replica's process, once.
        Not for: work that each node must do; that is ``on_before_download``.

        Parameters:
            ctx: The state of this initialization. Every read/write field counts.

        Returns:
            ``None``: go on with the next callback.
            ``Handled(...)``: this callback has initialized the nodes itself. The rest of the
            chain, ``on_before_download`` and the default download are skipped; ``on_after_init``
            still runs. ``model_path`` becomes the engine's model.
            Anything else, ``True`` and ``False`` included, is an error.

        Failure: ends the initialization with a ``HookError``; with ``on_error: warn`` it is
        logged and the next callback runs.

        Since: 0.1
        """

    @hookspec(firstresult=True)
    def on_before_download(
        self, ctx: CallbackCtx
    ) -> HookResult[Handled | str | os.PathLike[str] | None]:
        """Prepare one node, or bring its model.

        When: on each node right before its default download, also when the download mode is
        ``NONE``.
        Where: on every node of the placement group, once per node: in the replica's process on
        the replica's own node, in a Ray actor pinned to the node elsewhere.
        Not for: choosing nodes; the placement group is final here.

        Parameters:
            ctx: On the replica's own node the context of ``on_before_init``. Elsewhere a copy:
                the download mode set here counts for this node, ``extra_init_kwargs`` and
                ``custom_data`` are sent back, and changes to other fields have no effect.

        Returns:
            ``None``: go on with the next callback.
            ``Handled(model_path=...)``, or just the path: this node has its model. The rest of
            the chain and this node's default download are skipped.
            Anything else, ``True`` and ``False`` included, is an error.

        Failure: ends the initialization with a ``HookError`` and stops the other nodes;
        with ``on_error: warn`` it is logged and the next callback runs.

        Since: 0.1
        """

    @hookspec
    def on_after_init(self, ctx: CallbackCtx) -> HookResult[None]:
        """Look at, or finish, what has been initialized.

        When: after every node is ready, before the engine is built; also after a ``Handled``.
        Where: in the replica's process, once.
        Not for: anything that needs the running engine.

        Parameters:
            ctx: ``nodes`` holds each node's model path, ``custom_data`` and timings, ``handled``
                what a callback returned to take over; ``extra_init_kwargs`` and ``runtime_env``
                still count.

        Returns:
            ``None``: all callbacks run. Anything else is an error.

        Failure: ends the initialization with a ``HookError``; with ``on_error: warn`` it is
        logged and the next callback runs.

        Since: 0.1
        """

    @hookspec
    def on_init_failed(self, ctx: CallbackCtx, error: BaseException) -> HookResult[None]:
        """Clean up after an initialization that failed.

        When: after the first failure, a time limit or a cancellation; on a node whose work was
        still going on, after that was stopped.
        Where: on each node that had started, once, and then in the replica's process, once.
        In each, the callbacks that had started, in reverse list order. One that has no other
        hook counts as started.
        Not for: an engine that fails later, or a config that was refused.

        Parameters:
            ctx: The context as the failure left it. On another node whose process died, a copy of
                what it had at its start or sent back.
            error: What ended the initialization: a ``HookError``, or the ``CancelledError`` of
                a cancellation. On a node that was stopped because of another's failure, a
                ``HookError`` that says so.

        Returns:
            ``None``: all callbacks run. Anything else is an error.

        Failure: logged, and added to the ``cleanup_errors`` of the ``HookError`` that ends the
        initialization; the next callback runs.

        Since: 0.1
        """
