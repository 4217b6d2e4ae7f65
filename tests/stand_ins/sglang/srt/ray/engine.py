"""The engine that Ray's server starts; it answers with the arguments that it was started with."""

from __future__ import annotations

import json
import types
from typing import Any


class RayEngine:
    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.tokenizer_manager = types.SimpleNamespace(tokenizer=None)

    async def async_generate(self, prompt: str, **_: Any) -> dict[str, Any]:
        return {"text": json.dumps(self.arguments), "meta_info": {"finish_reason": "stop"}}

    def shutdown(self) -> None: ...
