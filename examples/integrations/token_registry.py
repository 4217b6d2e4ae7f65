"""Serve a model of a registry behind a token, such as ``team/tiny``.

``GET <registry>/models/<model>`` answers with ``{"version": ..., "files": [{"path", "sha256"}]}``,
``GET <registry>/models/<model>/<version>/<path>`` with a file. The token is read on each node, from
the variable that ``variable`` names, so that no config holds it.
"""

import hashlib
import os
from pathlib import Path

import requests

from rayserve_hooks import CallbackCtx, Handled, new_folder


class RegistryModel:
    def __init__(
        self, registry: str, model: str, folder: str, variable: str = "REGISTRY_TOKEN"
    ) -> None:
        self.url, self.model = f"{registry.rstrip('/')}/models/{model}", model
        self.folder, self.variable = Path(folder), variable

    def on_before_init(self, ctx: CallbackCtx) -> None:
        """Ask once, so that all nodes get the same version."""
        ctx.custom_data["registry"] = self._ask(self.url).json()

    def on_before_download(self, ctx: CallbackCtx) -> Handled:
        found = ctx.custom_data["registry"]
        target = self.folder / self.model / found["version"]
        with new_folder(target) as part:  # complete or absent, once per node
            for file in found["files"] if part else []:
                path = Path(f"{part}/{file['path']}")
                if ".." in path.parts:
                    raise ValueError(f"the registry names {file['path']!r}, outside of the model")
                path.parent.mkdir(parents=True, exist_ok=True)
                url = f"{self.url}/{target.name}/{file['path']}"
                with self._ask(url) as answer, path.open("w+b") as content:
                    content.writelines(answer.iter_content(2**20))
                    content.seek(0)
                    found_sha256 = hashlib.file_digest(content, "sha256").hexdigest()
                if found_sha256 != file["sha256"]:
                    raise OSError(f"{file['path']} of {self.model} is damaged; start again")
        return Handled(target, f"{self.model} {target.name} of the registry")

    def _ask(self, url: str) -> requests.Response:
        token = os.environ[self.variable]
        headers = {"Accept-Encoding": "identity", "Authorization": f"Bearer {token}"}
        answer = requests.get(url, headers=headers, timeout=60, stream=True)
        if answer.status_code in (401, 403):
            raise PermissionError(f"the registry refuses the token of {self.variable}")
        answer.raise_for_status()
        return answer
