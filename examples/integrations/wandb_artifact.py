"""Serve a Weights & Biases artifact.

``WANDB_API_KEY`` is in each node's environment; ``WANDB_BASE_URL`` names a server of your own.
"""

import hashlib
import os
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

from rayserve_hooks import CallbackCtx, Handled, new_folder

QUERY = """query Files($entity: String!, $project: String!, $collection: String!, $alias: String!,
$cursor: String) { project(name: $project, entityName: $entity) { artifactCollection(name:
$collection) { artifactMembership(aliasName: $alias) { versionIndex files(after: $cursor, first:
500) { pageInfo { endCursor hasNextPage } edges { node { displayName directUrl md5 } } } } } } }"""
PARTS = ("entity", "project", "collection")


class WandbArtifact:
    def __init__(self, artifact: str, alias: str, folder: str) -> None:
        self.alias, self.folder = alias, Path(folder, artifact)
        self.asked = dict(zip(PARTS, artifact.split("/"), strict=True))

    def on_before_init(self, ctx: CallbackCtx) -> None:  # once: all nodes get the same version
        ctx.custom_data["wandb"] = f"v{next(self.pages(self.alias))['versionIndex']}"

    def on_before_download(self, ctx: CallbackCtx) -> Handled:
        target = self.folder / ctx.custom_data["wandb"]
        with new_folder(target) as part:  # complete or absent, once per node
            for page in self.pages(target.name) if part else []:
                for node in (edge["node"] for edge in page["files"]["edges"]):
                    name = os.path.normpath(f"/{node['displayName']}")  # "..", at the root, is it
                    fetch(node["directUrl"], Path(f"{part}{name}"), node["md5"])
        return Handled(target, f"{target} is of Weights & Biases")

    def pages(self, alias: str) -> Iterator[Any]:
        base = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        login, cursor, more = ("api", os.environ["WANDB_API_KEY"]), None, True
        while more:
            body = {"query": QUERY, "variables": {**self.asked, "alias": alias, "cursor": cursor}}
            answer = requests.post(f"{base}/graphql", json=body, auth=login, timeout=60)
            answer.raise_for_status()
            page = answer.json()["data"]["project"]["artifactCollection"]["artifactMembership"]
            cursor, more = (page["files"]["pageInfo"][key] for key in ("endCursor", "hasNextPage"))
            yield page


def fetch(url: str, path: Path, md5: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with requests.get(url, stream=True, timeout=60) as answer, path.open("w+b") as file:
        file.writelines(answer.iter_content(2**20))
        file.seek(0)
        found = b64encode(hashlib.file_digest(file, "md5").digest()).decode()
    if found != md5:
        raise OSError(f"{path.name} of the artifact is damaged; start again")
