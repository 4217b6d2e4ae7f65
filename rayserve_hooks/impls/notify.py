"""Report a replica's start to a webhook."""

from __future__ import annotations

import datetime as dt
import json
import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.arguments import checked_arguments
from rayserve_hooks.core.masking import redact
from rayserve_hooks.errors import CallbackConfigError, HookError
from rayserve_hooks.hookspecs import hookimpl
from rayserve_hooks.impls._startup import this_replica

Event = Literal["start", "ready", "failed", "shutdown"]
EVENTS: tuple[Event, ...] = ("start", "ready", "failed", "shutdown")
Variable = Annotated[str, Field(pattern=r"^\w+$")]
_MOST_WAITING = 16


def _http(url: str) -> str:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        valid = False
    if not valid:
        raise ValueError("write an http:// or https:// URL")
    return url


class Notify:
    """Post each event of a start to a webhook, as JSON, beside the start.

    A message is ``{"event": "ready", "model_id": ..., "app": ..., "deployment": ...,
    "replica": ..., "node": ..., "time": ..., "seconds": ...}``; a failure has ``error``,
    ``callback`` and ``hook``, too. Secrets in them are masked. What cannot be sent is a warning,
    and nothing waits for it: only a replica that is going to end, by a failure or a shutdown, waits
    for what is under way, at most ``timeout_s``.

    Args:
        url: Of the webhook. Where it is itself a secret, use ``url_variable``. Default: None.
        url_variable: The environment variable, of the replica's node, that holds it; one of the
            two is needed. Default: None.
        token_variable: The environment variable that holds a token, sent as
            ``Authorization: Bearer``. Default: None.
        events: What to report, of ``start``, ``ready``, ``failed`` and ``shutdown``. Default: all.
        timeout_s: Of each message, in seconds. Default: 5.

    Raises:
        CallbackConfigError: An argument is wrong; the message names each one.
    """

    @checked_arguments
    def __init__(
        self,
        url: Annotated[str, AfterValidator(_http)] | None = None,
        url_variable: Variable | None = None,
        token_variable: Variable | None = None,
        events: Annotated[Sequence[Event], Field(min_length=1)] = EVENTS,
        timeout_s: Annotated[float, Field(gt=0, le=60)] = 5.0,
    ) -> None:
        if (url is None) == (url_variable is None):
            raise CallbackConfigError("Notify takes exactly one of url and url_variable; give one")
        self.url = url
        self.url_variable = url_variable
        self.token_variable = token_variable
        self.events = tuple(events)
        self.timeout_s = timeout_s
        self._started = 0.0
        self._sender: _Sender | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sender": None}  # a thread does not travel

    @hookimpl(tryfirst=True)
    def on_before_init(self, ctx: CallbackCtx) -> None:
        self._started = time.monotonic()
        self._post(ctx, "start")

    @hookimpl(trylast=True)
    def on_engine_ready(self, ctx: CallbackCtx) -> None:
        self._post(ctx, "ready")

    def on_init_failed(self, ctx: CallbackCtx, error: BaseException) -> None:
        if ctx.process.role == "node":
            return
        text = redact(str(error), ctx.runtime_env, ctx.custom_data, ctx.extra_init_kwargs)
        about = {"error": text, "callback": None, "hook": None}
        if isinstance(error, HookError):
            about |= {"callback": error.callback, "hook": error.hook}
        self._post(ctx, "failed", about, wait=True)

    def on_shutdown(self, ctx: CallbackCtx) -> None:
        self._post(ctx, "shutdown", wait=True)

    def _post(
        self,
        ctx: CallbackCtx,
        event: Event,
        about: Mapping[str, Any] | None = None,
        *,
        wait: bool = False,
    ) -> None:
        try:
            if event in self.events:
                self._send(ctx, event, about or {})
            if wait and self._sender is not None:
                self._sender.wait(self.timeout_s)
        except Exception as error:  # it only reports, and ends no start
            ctx.log.warning("the webhook was not told of %r: %s", event, redact(repr(error)))

    def _send(self, ctx: CallbackCtx, event: Event, about: Mapping[str, Any]) -> None:
        replica = this_replica()
        seconds = round(time.monotonic() - self._started, 3) if self._started else None
        message = {
            "event": event,
            "model_id": ctx.llm_config.model_id,
            "app": replica.app,
            "deployment": replica.deployment,
            "replica": replica.id,
            "node": ctx.node.id,
            "time": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
            "seconds": seconds,
            **about,
        }
        if self._sender is None:
            self._sender = _Sender(self.timeout_s, ctx.log)
        self._sender.send(self._target(), message)

    def _target(self) -> tuple[str, str]:
        """Return the URL and the token, as they are set now; empty where they are not."""
        url = self.url or os.environ.get(self.url_variable or "", "")
        return url, os.environ.get(self.token_variable or "", "")


class _Sender:
    """Sends messages one after another, in a thread that keeps no process from ending."""

    def __init__(self, timeout_s: float, log: Any) -> None:
        self._timeout_s, self._log = timeout_s, log
        self._waiting: queue.Queue[tuple[str, str, dict[str, Any]]] = queue.Queue(_MOST_WAITING)
        threading.Thread(target=self._run, name="notify", daemon=True).start()

    def send(self, target: tuple[str, str], message: dict[str, Any]) -> None:
        try:
            self._waiting.put_nowait((*target, message))
        except queue.Full:
            self._log.warning("the webhook was not told of %r: it is too slow", message["event"])

    def wait(self, longest_s: float) -> None:
        """Wait until all is sent, or given up."""
        deadline = time.monotonic() + longest_s
        with self._waiting.all_tasks_done:
            while self._waiting.unfinished_tasks and (left := deadline - time.monotonic()) > 0:
                self._waiting.all_tasks_done.wait(left)

    def _run(self) -> None:
        while True:
            url, token, message = self._waiting.get()
            try:
                _post_json(url, token, message, self._timeout_s)
            except Exception as error:
                host = urlsplit(url).hostname
                self._log.warning(
                    "the webhook at %s was not told of %r: %s; look whether it is up and may be "
                    "reached from this node",
                    host or "no URL, for the variable is not set,",
                    message["event"],
                    redact(f"{type(error).__name__}: {error}", {"token": token, "url_secret": url}),
                )
            finally:
                self._waiting.task_done()


def _post_json(url: str, token: str, message: Mapping[str, Any], timeout_s: float) -> None:
    import urllib.request

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:  # the token is for this server alone
            return None

    headers = {"Content-Type": "application/json", "User-Agent": "rayserve_hooks"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    data = json.dumps(message).encode()
    request = urllib.request.Request(_http(url), data, headers)  # noqa: S310 - it is checked
    with urllib.request.build_opener(NoRedirect).open(request, timeout=timeout_s) as answer:
        answer.read(1)
