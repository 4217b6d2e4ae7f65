"""A model and a reasoning parser that vLLM does not know; registered by ``engine_modules``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ARCHITECTURE = "NobodysForCausalLM"
PARSER = "first_word"


def register() -> None:
    """Make vLLM know the architecture, in whichever process this is."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, "own_model_class:NobodysForCausalLM")


def register_parser() -> None:
    """Make vLLM know the parser; it is looked up where chats are answered, in the replica."""
    from vllm.reasoning import ReasoningParser, ReasoningParserManager

    class FirstCharacter(ReasoningParser):
        """Take the first character for the reasoning, and the rest for the answer."""

        def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
            return True

        def extract_content_ids(self, input_ids: list[int]) -> list[int]:
            return input_ids

        def extract_reasoning(self, model_output: str, request: Any) -> tuple[str, str]:
            return f"thought: {model_output[:1]}", model_output[1:]

        def extract_reasoning_streaming(self, *_: Any, **__: Any) -> None:
            return None

    ReasoningParserManager.register_module(PARSER, force=True, module=FirstCharacter)
