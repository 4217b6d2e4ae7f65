"""Replace the whole node initialization: the model is there already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core.arguments import checked_arguments
from rayserve_hooks.findings import Finding

_MOUNT = "mount the folder there"


def _absolute(path: object) -> Path:
    if not isinstance(path, str | Path):
        raise ValueError("write a path")  # noqa: TRY004 - pydantic collects ValueErrors only
    if not Path(path).is_absolute():
        raise ValueError("give an absolute path, which means the same in every process")
    return Path(path)


ModelPath = Annotated[
    str | Path, PlainValidator(_absolute), WithJsonSchema({"type": "string", "pattern": "^/"})
]


class CustomInitialization:
    """Serve a model that every node can read already, from a shared or a baked-in folder.

    It answers ``on_before_init`` with `Handled`, so no node is prepared and nothing is
    downloaded; put callbacks that must run before it earlier in the list. To bring the model in
    your own way, take this file as the example.

    Args:
        model_path: The model's folder, an absolute path that is the same on every node. Required.
        required_files: Names of files that must be in it, checked on the replica's node. Default:
            ``config.json``.

    Raises:
        CallbackConfigError: An argument is wrong; the message names each one.
    """

    @checked_arguments
    def __init__(
        self, model_path: ModelPath, required_files: Sequence[str] = ("config.json",)
    ) -> None:
        self.model_path = Path(model_path)
        self.required_files = tuple(required_files)

    def doctor(self, llm_config: Mapping[str, Any]) -> Iterator[Finding]:
        """Yield a finding that says whether the model is there."""
        if missing := self._missing():
            detail = f"{str(self.model_path)!r} has no {', '.join(missing)}"
            yield Finding("model", "problem", detail, f"{_MOUNT}, or correct model_path")
        else:
            yield Finding("model", "ok", f"{str(self.model_path)!r} is there")

    def on_before_init(self, ctx: CallbackCtx) -> Handled:
        if missing := self._missing():
            raise FileNotFoundError(
                f"{str(self.model_path)!r} on node {ctx.node} has no {', '.join(missing)}; "
                f"{_MOUNT}, or correct model_path"
            )
        return Handled(model_path=self.model_path, reason=f"model is at {self.model_path}")

    def _missing(self) -> list[str]:
        return [name for name in self.required_files if not (self.model_path / name).is_file()]
