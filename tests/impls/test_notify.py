from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from plugins_for_tests import hook_log, refused
from waiting import until

from rayserve_hooks.context import CallbackCtx, ProcessInfo
from rayserve_hooks.impls.notify import Notify
from rayserve_hooks.testing import Fail, ModelConfig, RunStack, sent


class Webhook(ThreadingHTTPServer):
    """Keeps what it is told, in order."""

    daemon_threads = True

    def __init__(self, status: int = 200, to: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.to = status, to
        self.messages: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.may_answer = threading.Event()
        self.may_answer.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook"

    @property
    def events(self) -> list[str]:
        return [message["event"] for message in self.messages]


class _Handler(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.messages.append(json.loads(body))
        self.server.headers.append(dict(self.headers))
        self.server.may_answer.wait(10)
        with contextlib.suppress(OSError):
            self.send_response(self.server.status)
            if self.server.to:
                self.send_header("Location", self.server.to)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(server: Webhook) -> Iterator[Webhook]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.may_answer.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    with serving(Webhook()) as server:
        yield server


class Fails:
    def on_engine_ready(self, ctx: CallbackCtx) -> None:
        raise ValueError("password=hunter2hunter2 is wrong")


def notify(**arguments: Any) -> dict[str, Any]:
    return {"callback": Notify, "kwargs": arguments}


def test_start_ready_and_shutdown_are_told_in_order(run_stack: RunStack, webhook: Webhook) -> None:
    run_stack(notify(url=webhook.url)).assert_succeeded()  # the shutdown waits for what is sent
    assert webhook.events == ["start", "ready", "shutdown"]
    message = webhook.messages[1]
    assert message["seconds"] >= 0
    assert (message["model_id"], message["node"], message["app"]) == ("tiny", "node-1", "")
    assert "Authorization" not in webhook.headers[0]


def test_a_failure_is_told_with_its_callback_and_without_secrets(
    run_stack: RunStack, webhook: Webhook
) -> None:
    error = run_stack([notify(url=webhook.url), Fails]).assert_failed(callback="Fails")
    assert error.cleanup_errors == []
    assert webhook.events == ["start", "failed"]
    message = webhook.messages[-1]
    assert (message["callback"], message["hook"]) == ("Fails", "on_engine_ready")
    assert "is wrong" in message["error"]
    assert "hunter2" not in json.dumps(webhook.messages)


def test_a_failure_of_another_node_is_told_once(run_stack: RunStack, webhook: Webhook) -> None:
    failing = Fail("on_before_download", on="node-2")
    run_stack([notify(url=webhook.url), failing], nodes=2).assert_failed(callback="Fail")
    assert webhook.events == ["start", "failed"]


def test_a_node_leaves_the_failure_to_the_replica(webhook: Webhook) -> None:
    # Without a hook that runs there it is not even called there, so this is not of the path.
    config: Any = ModelConfig()
    ctx = CallbackCtx(llm_config=config, process=ProcessInfo("node"))
    Notify(url=webhook.url).on_init_failed(ctx, ValueError("x"))  # which waits for what it sends
    assert webhook.events == []


def test_only_the_events_that_are_named_are_told(run_stack: RunStack, webhook: Webhook) -> None:
    run_stack(notify(url=webhook.url, events=["ready"])).assert_succeeded()
    assert webhook.events == ["ready"]


def test_url_and_token_come_from_variables(run_stack: RunStack, webhook: Webhook) -> None:
    run_stack(
        notify(url_variable="HOOK_URL", token_variable="HOOK_TOKEN"),
        environment={"HOOK_URL": webhook.url, "HOOK_TOKEN": "letmein-letmein"},
    )
    assert webhook.headers[0]["Authorization"] == "Bearer letmein-letmein"


def test_a_webhook_that_hangs_delays_no_start(
    run_stack: RunStack, webhook: Webhook, caplog: pytest.LogCaptureFixture
) -> None:
    webhook.may_answer.clear()
    started = time.monotonic()
    with hook_log(caplog):  # the last is given up when the replica has ended
        run_stack(notify(url=webhook.url, timeout_s=0.1)).assert_succeeded()
        until(lambda: "was not told of 'shutdown'" in caplog.text)
    assert time.monotonic() - started < 5
    told = [r for r in caplog.records if "was not told of" in r.getMessage()]
    assert [record.levelno for record in told] == [logging.WARNING] * 3


def test_a_port_that_nobody_listens_on_is_a_warning_that_says_what_to_do(
    run_stack: RunStack,
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/T000/secretpath"
        outcome = run_stack(notify(url=url)).assert_succeeded()
    *_, line = outcome.logged("Notify")
    assert line.startswith("WARNING: the webhook at 127.0.0.1 was not told of 'shutdown': URLError")
    assert "; look whether it is up" in line
    assert "secretpath" not in "".join(outcome.log)


def test_a_variable_that_is_not_set_is_a_warning(run_stack: RunStack) -> None:
    outcome = run_stack(notify(url_variable="NO_SUCH_VARIABLE")).assert_succeeded()
    text = "WARNING: the webhook at no URL, for the variable is not set, was not told of"
    assert [line.startswith(text) for line in outcome.logged("Notify")] == [True] * 3


def test_a_redirect_gets_no_token(run_stack: RunStack, webhook: Webhook) -> None:
    with serving(Webhook(302, to=webhook.url)) as other:
        outcome = run_stack(
            notify(url=other.url, token_variable="HOOK_TOKEN"),
            environment={"HOOK_TOKEN": "letmein-letmein"},
        )
    assert webhook.messages == []
    assert "HTTPError: HTTP Error 302" in "".join(outcome.logged("Notify"))


def test_what_fails_in_it_ends_no_start(
    run_stack: RunStack, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def fails(thread: threading.Thread) -> None:
        if thread.name == "notify":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fails)
    outcome = run_stack(notify(url=webhook.url)).assert_succeeded()
    text = "the webhook was not told of 'start': RuntimeError(\"can't start new thread\")"
    assert outcome.logged("Notify")[0] == f"WARNING: {text}"


def test_it_travels() -> None:
    notify = Notify(url="http://127.0.0.1:1/")
    assert sent(notify).url == notify.url


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, " takes exactly one of url and url_variable; give one"),
        ({"url": "http://x", "url_variable": "U"}, " takes exactly one of url and url_variable"),
        ({"url": "ftp://x"}, "(url='ftp://x'): write an http:// or https:// URL"),
        ({"url": "http://x:port"}, "(url='http://x:port'): write an http:// or https:// URL"),
        ({"url": "http://x", "events": []}, "(events=[]): give at least 1 items"),
        ({"url": "http://x", "timeout_s": 600}, "(timeout_s=600): write at most 60"),
        (
            {"url": "http://x", "events": ["stop"]},
            "(events[0]='stop'): use one of failed, ready, shutdown, start",
        ),
    ],
)
def test_a_wrong_argument_is_refused_where_the_config_is_made(
    arguments: dict[str, Any], text: str
) -> None:
    with refused(f"Notify{text}"):
        Notify(**arguments)
