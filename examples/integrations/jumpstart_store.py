"""Serve a model of a store that is laid out as SageMaker JumpStart's.

callbacks:
  - callback: jumpstart_store:JumpStartModel
    kwargs: {bucket: "s3://our-jumpstart-hub", model_id: "meta-tiny", folder: /models}
"""

import json
from pathlib import Path
from typing import Any

from rayserve_hooks import CallbackCtx, Handled, download_files

MANIFEST = "models_manifest.json"


class JumpStartModel:
    """Look a model up in the manifest, read its spec, and fetch its files on each node.

    Args:
        bucket: The store, such as ``s3://jumpstart-cache-prod-us-west-2``.
        model_id: The model in the manifest.
        folder: Where models go on each node.
        version: Its version; ``"*"`` for the newest at this start.
    """

    def __init__(self, bucket: str, model_id: str, folder: str, version: str = "*") -> None:
        self.bucket = bucket.rstrip("/")
        self.model_id = model_id
        self.folder = Path(folder)
        self.version = version

    def on_before_init(self, ctx: CallbackCtx) -> None:
        """Decide on the version once, so that all nodes have the same."""
        models = [m for m in self._json(MANIFEST) if m["model_id"] == self.model_id]
        known = {model["version"]: model["spec_key"] for model in models}
        if not known or self.version not in ("*", *known):
            raise ValueError(
                f"{self.bucket} has no {self.model_id!r} of version {self.version!r}; it has "
                f"{', '.join(sorted(known)) or 'none at all'}"
            )
        newest = max(known, key=lambda v: [int(part) for part in v.split(".")])
        version = newest if self.version == "*" else self.version
        key = self._json(known[version])["hosting_artifact_key"]
        ctx.custom_data["jumpstart"] = {"key": key, "version": version}

    def on_before_download(self, ctx: CallbackCtx) -> Handled:
        chosen = ctx.custom_data["jumpstart"]
        target = self.folder / self.model_id / chosen["version"]
        download_files(f"{self.bucket}/{chosen['key']}", target)
        return Handled(target, f"{self.model_id} {chosen['version']} of {self.bucket}")

    def _json(self, key: str) -> Any:
        path = self.folder / ".jumpstart" / Path(key).name
        download_files(f"{self.bucket}/{key}", path)
        return json.loads(path.read_text())
