"""Replace the whole node initialization: the model is there already."""

from collections.abc import Sequence
from pathlib import Path

from rayserve_hooks.context import CallbackCtx, Handled
from rayserve_hooks.errors import CallbackConfigError


class CustomInitialization:
    """Serve a model that every node can read already, from a shared or a baked-in folder.

    It answers ``on_before_init`` with `Handled`, so no node task runs and nothing is downloaded;
    put callbacks that must run before it earlier in the list. To bring the model in your own
    way, take this file as the example.

    Args:
        model_path: The model's folder, the same on every node.
        required_files: What must be in it, checked on the replica's node.

    Raises:
        CallbackConfigError: ``model_path`` is not absolute.
    """

    def __init__(self, model_path: str, required_files: Sequence[str] = ("config.json",)) -> None:
        if not Path(model_path).is_absolute():
            raise CallbackConfigError(
                f"CustomInitialization(model_path={model_path!r}): give an absolute path, which "
                "means the same in every process"
            )
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
