"""A stand-in for vLLM's client of the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


@dataclass
class Engine:
    """What callbacks get as ``ctx.engine``: it answers each prompt with the same text.

    Args:
        text: The answer.

    Attributes:
        prompts: What it was asked.
    """

    text: str = "ok"
    prompts: list[Any] = field(default_factory=list)

    async def generate(
        self, prompt: Any, sampling_params: Any = None, request_id: str = "", **_: Any
    ) -> AsyncIterator[Output]:
        self.prompts.append(prompt)
        yield Output(request_id, prompt, [Completion(self.text)])

    async def check_health(self) -> None:
        """Return: it is well."""

    # Hidden from type checkers, for which a name that is not there must not exist.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            raise AttributeError(
                f"the engine of a test has no {name!r}; give run_stack() a stand-in of your own as "
                "its engine"
            )


@dataclass(frozen=True)
class Completion:
    """A stand-in for vLLM's ``CompletionOutput``."""

    text: str
    index: int = 0
    finish_reason: str = "stop"


@dataclass(frozen=True)
class Output:
    """A stand-in for vLLM's ``RequestOutput``."""

    request_id: str
    prompt: Any
    outputs: list[Completion]
    finished: bool = True
