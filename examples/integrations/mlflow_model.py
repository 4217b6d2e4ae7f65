"""Serve a model of an MLflow registry, such as ``tiny`` of the alias ``champion``.

``MLFLOW_TRACKING_URI`` and ``MLFLOW_TRACKING_TOKEN`` are in each node's environment.
"""

import os
from pathlib import Path

import requests

from rayserve_hooks import CallbackCtx, Handled, download_files, new_folder

FILES = "mlflow-artifacts/artifacts"


class MlflowModel:
    def __init__(self, name: str, alias: str, folder: str, weights: str = "model") -> None:
        self.name, self.alias, self.folder, self.weights = name, alias, Path(folder), weights

    def on_before_init(self, ctx: CallbackCtx) -> None:  # once: all nodes get the same version
        found = ask("mlflow/registered-models/alias", name=self.name, alias=self.alias).json()
        asked = {"name": self.name, "version": found["model_version"]["version"]}
        source = ask("mlflow/model-versions/get-download-uri", **asked).json()["artifact_uri"]
        ctx.custom_data["mlflow"] = {"source": source, "version": asked["version"]}

    def on_before_download(self, ctx: CallbackCtx) -> Handled:
        source, version = ctx.custom_data["mlflow"]["source"], ctx.custom_data["mlflow"]["version"]
        target = self.folder / self.name / version
        if source.startswith("mlflow-artifacts:/"):
            with new_folder(target) as part:  # complete or absent, once per node
                if part:
                    fetch(source.partition(":")[2].strip("/"), part)
        else:
            download_files(source, target)
        return Handled(target / self.weights, f"{self.name} {version} of MLflow")


def fetch(path: str, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for file in ask(FILES, path=path).json().get("files", []):
        name = Path(file["path"]).name
        if file.get("is_dir"):
            fetch(f"{path}/{name}", target / name)
            continue
        with ask(f"{FILES}/{path}/{name}") as answer, (target / name).open("wb") as out:
            out.writelines(answer.iter_content(2**20))
        if (target / name).stat().st_size != file["file_size"]:
            raise OSError(f"MLflow has sent a part of {path}/{name} only; look at its log")


def ask(what: str, **query: str) -> requests.Response:
    base, token = os.environ["MLFLOW_TRACKING_URI"], os.environ.get("MLFLOW_TRACKING_TOKEN")
    headers = {"Accept-Encoding": "identity", "Authorization": f"Bearer {token}"}
    url = f"{base}/api/2.0/{what}"
    answer = requests.get(url, query, headers=headers, timeout=60, stream=True)
    answer.raise_for_status()
    return answer
