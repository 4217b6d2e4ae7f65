"""Replace the whole node initialization: the model is there already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import PlainValidator, WithJsonSchema

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.core.arguments import checked_arguments


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

    def on_before_init(self, ctx: CallbackCtx) -> Handled:
        missing = [name for name in self.required_files if not (self.model_path / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{str(self.model_path)!r} on node {ctx.node} has no {', '.join(missing)}; mount "
                "the folder there, or correct model_path"
            )
        return Handled(model_path=self.model_path, reason=f"model is at {self.model_path}")
