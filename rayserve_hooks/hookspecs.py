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
"""Marks what a hook is: the decorator of this file's hooks."""

hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks how a callback's method is run: ``tryfirst=True``, ``trylast=True``, ``wrapper=True`` or
``specname="on_..."``; optional, since a method with the name of a hook is that hook."""

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

    @hookspec
    def on_configure(self, ctx: CallbackCtx) -> HookResult[None]:
        """Set what Serve deploys a replica with.

        When: before Serve makes the deployment, once for each of its configs.
        Where: where the app is built, by the builders of this package: ``build_openai_app``,
            ``build_dp_openai_app`` and ``build_pd_openai_app``.
        Not for: Ray's own builders, which do not call it; nor for work on a node, since this
            process may run on any.

        Parameters:
            ctx: A context without nodes. ``runtime_env``, ``placement_group_config`` and
                ``extra_init_kwargs`` become the deployment's; ``custom_data`` is what each
                replica begins with.

        Returns:
            ``None``: all callbacks run. Anything else is an error.

        Failure: ends the building of the app with a ``HookError``, and nothing is deployed;
        with ``on_error: warn`` it is logged and the next callback runs.

        Since: 0.2
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
    def on_before_engine_init(self, ctx: CallbackCtx) -> HookResult[None]:
        """Prepare a process of the engine, for example by registering a model.

        When: before that process builds anything of the engine; in the replica after
        ``on_after_init``.
        Where: in every process of the engine, once each: the replica, the task that makes the
            engine config on a GPU, the engine core, and each worker rank, on other nodes too.
        Not for: what changes the engine's arguments, which are final here.

        Parameters:
            ctx: In the replica the context of ``on_after_init``. Elsewhere a copy, in which
                changes have no effect; ``process`` says which process this is.

        Returns:
            ``None``: all callbacks run. Anything else is an error.

        Failure: ends the engine's start with a ``HookError`` that names the process; with
        ``on_error: warn`` it is logged and the next callback runs.

        Since: 0.2
        """

    @hookspec
    def on_engine_ready(self, ctx: CallbackCtx) -> HookResult[None]:
        """Use the engine before the replica reports that it is ready.

        When: after the engine has started and each of its processes has run its hooks.
        Where: in the replica's process, once.
        Not for: an initialization outside of Ray Serve, which starts no engine.

        Parameters:
            ctx: ``engine`` is vLLM's client; ``trace`` has the calls of all processes.

        Returns:
            ``None``: all callbacks run; the replica reports ready when they have. Anything else
            is an error.

        Failure: ends the replica's start with a ``HookError``; with ``on_error: warn`` it is
        logged and the next callback runs.

        Since: 0.2
        """

    @hookspec
    def on_shutdown(self, ctx: CallbackCtx) -> HookResult[None]:
        """Release what the callbacks hold, when the replica is stopped.

        When: while Serve stops a replica that has been ready: scaled down, redeployed, updated
        or deleted; before the engine is stopped.
        Where: in the replica's process, once, in reverse list order.
        Not for: a start that failed, which is ``on_init_failed``, nor a replica that is killed.

        Parameters:
            ctx: The context of ``on_engine_ready``.

        Returns:
            ``None``: all callbacks run. Anything else is an error.

        Failure: logged; the next callback runs, and the replica stops all the same.

        Since: 0.2
        """

    @hookspec
    def on_init_failed(self, ctx: CallbackCtx, error: BaseException) -> HookResult[None]:
        """Clean up after a start that failed.

        When: after the first failure up to and including the engine's start and
        ``on_engine_ready``, a time limit or a cancellation; on a node whose work was still going
        on, after that was stopped.
        Where: on each node that had started, once, and then in the replica's process, once.
        In each, the callbacks that had started, in reverse list order. One that has no other
        hook counts as started.
        Not for: an engine that fails once it was ready, or a config that was refused.

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
