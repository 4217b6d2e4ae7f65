from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from plugins_for_tests import refused

from rayserve_hooks.impls.warm_up import WarmUp
from rayserve_hooks.testing import Outcome, RunStack


class Engine:
    """Answers as vLLM's client does: with all of the tokens so far, again and again."""

    def __init__(self, error: Exception | None = None, hangs: bool = False) -> None:
        self.error, self.hangs = error, hangs
        self.asked: list[tuple[str, int, str]] = []

    async def generate(self, prompt: str, limits: Any, request_id: str) -> AsyncIterator[Any]:
        assert limits.ignore_eos
        self.asked.append((prompt, limits.max_tokens, request_id))
        if self.hangs:
            await asyncio.Event().wait()
        for tokens in range(1, limits.max_tokens + 1):
            if self.error is not None:
                raise self.error
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7] * tokens)])


@pytest.fixture(autouse=True)
def _sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for vLLM, which takes seconds to import; the engine's test has the real one."""
    fake = SimpleNamespace(SamplingParams=SimpleNamespace)
    monkeypatch.setitem(__import__("sys").modules, "vllm", fake)


def warm_up(run_stack: RunStack, engine: Engine, **arguments: Any) -> Outcome:
    return run_stack({"callback": WarmUp, "kwargs": arguments}, engine=engine)


def test_each_request_goes_through_the_engine(run_stack: RunStack) -> None:
    engine = Engine()
    outcome = warm_up(run_stack, engine, requests=3, prompt="Once", max_tokens=4)
    assert sorted(engine.asked) == [("Once", 4, f"warm_up-{number}") for number in range(3)]
    (line,) = outcome.assert_succeeded().logged("WarmUp")
    assert line.startswith("INFO: warmed up: 3 requests, 12 tokens in ")


def test_the_requests_run_on_the_loop_of_the_engine(run_stack: RunStack) -> None:
    """vLLM's client belongs to the replica's loop, and hooks run on another one."""
    ready = threading.Event()
    ended = asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    class OnItsLoop(Engine):
        output_handler: asyncio.Task[Any]

        async def generate(self, *arguments: Any) -> AsyncIterator[Any]:
            loops.append(asyncio.get_running_loop())
            async for output in super().generate(*arguments):
                yield output

    engine = OnItsLoop()

    async def replica() -> None:
        engine.output_handler = asyncio.ensure_future(ended.wait())
        ready.set()
        await engine.output_handler

    thread = threading.Thread(target=asyncio.run, args=(replica(),))
    thread.start()
    ready.wait()
    loop = engine.output_handler.get_loop()
    try:
        warm_up(run_stack, engine, requests=2, on_failure="raise").assert_succeeded()
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
    assert loops == [loop, loop]


def test_a_failure_is_a_warning(run_stack: RunStack) -> None:
    outcome = warm_up(run_stack, Engine(ValueError("the prompt is too long")))
    (line,) = outcome.assert_succeeded().logged("WarmUp")
    assert line.startswith(
        "WARNING: the engine was not warmed up: ValueError: the prompt is too long; the replica "
        "becomes"
    )


def test_a_failure_ends_the_start_where_that_is_wanted(run_stack: RunStack) -> None:
    engine = Engine(ValueError("the prompt is too long"))
    warm_up(run_stack, engine, on_failure="raise").assert_failed("the prompt is too long")


def test_an_engine_that_hangs_is_given_up(run_stack: RunStack) -> None:
    outcome = warm_up(run_stack, Engine(hangs=True), timeout_s=0.01).assert_succeeded()
    (line,) = outcome.logged("WarmUp")
    assert "not warmed up: no answer within 0.01 s, which is timeout_s; the" in line


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"requests": 0}, "(requests=0): write more than 0"),
        ({"prompt": ""}, "(prompt=''): write at least 1 characters"),
        ({"max_tokens": "many"}, "(max_tokens='many'): write a whole number"),
        ({"timeout_s": float("inf")}, "(timeout_s=inf): write a finite number"),
        ({"on_failure": "ignore"}, "(on_failure='ignore'): use one of raise, warn"),
    ],
)
def test_a_wrong_argument_is_refused_where_the_config_is_made(
    arguments: dict[str, Any], text: str
) -> None:
    with refused(f"WarmUp{text}"):
        WarmUp(**arguments)
