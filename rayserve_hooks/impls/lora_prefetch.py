"""Have LoRA adapters on every node before the replica reports ready."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from rayserve_hooks.context import CallbackCtx
from rayserve_hooks.core.arguments import checked_arguments
from rayserve_hooks.core.threads import check_given_up
from rayserve_hooks.download.caller import Caller
from rayserve_hooks.download.files import download_files, list_folders
from rayserve_hooks.download.safe_files import own_folder
from rayserve_hooks.errors import DownloadError

ADAPTERS = "lora_prefetch"
"""The key of ``ctx.custom_data`` with the URI and the folder of each adapter."""

CONFIG_FILE = "adapter_config.json"
_WAY_OUT = "mount a folder there that is this user's alone: an adapter there would be served"


def _name(text: str) -> str:
    if not text.strip(".") or "/" in text:
        raise ValueError("write the name of a folder right below the LoRA path")
    return text


Name = Annotated[str, AfterValidator(_name)]


class LoraPrefetch:
    """Download LoRA adapters from ``lora_config.dynamic_lora_loading_path`` to each node.

    They go where Ray's own loader puts and looks for them, verified, several at once. List it
    before the callback that brings the model, which ends the chain on its node. An adapter that
    cannot be fetched is a warning, because base model and other adapters can be served without it;
    a folder in which another user could have planted one is always an error.

    Args:
        adapters: Names of the adapters, what comes after the colon in ``model:adapter``. Default:
            None, all folders with an ``adapter_config.json`` right below the path.
        parallel_adapters: How many a node fetches at once. Default: 8.
        required: Whether one that cannot be fetched ends the start. Default: False.

    Raises:
        CallbackConfigError: An argument is wrong; the message names each one.
    """

    @checked_arguments
    def __init__(
        self,
        adapters: Sequence[Name] | None = None,
        parallel_adapters: Annotated[int, Field(ge=1, le=64)] = 8,
        required: bool = False,
    ) -> None:
        self.adapters = adapters
        self.parallel_adapters = parallel_adapters
        self.required = required

    def on_before_init(self, ctx: CallbackCtx) -> None:
        from rayserve_hooks.cluster.adapters import adapter_folders, adapters_uri

        uri = adapters_uri(ctx.llm_config)
        if uri is None:
            raise ValueError(
                "the config has no lora_config with a dynamic_lora_loading_path; set it, or take "
                "lora_prefetch out of the callbacks"
            )
        try:
            names = self.adapters or list_folders(uri, CONFIG_FILE, self._caller(ctx))
        except DownloadError as error:
            self._failed(ctx, [str(error)])
            return
        found = {
            f"{uri}/{name}": folder
            for name, folder in adapter_folders(ctx.llm_config, names).items()
        }
        ctx.log.info("%d adapters of %s: %s", len(names), ctx.llm_config.model_id, ", ".join(names))
        ctx.custom_data[ADAPTERS] = {**ctx.custom_data.get(ADAPTERS, {}), **found}

    def on_before_download(self, ctx: CallbackCtx) -> None:
        adapters: dict[str, str] = ctx.custom_data.get(ADAPTERS, {})
        caller, problems = self._caller(ctx), []

        def fetch(uri: str, folder: str) -> None:
            try:
                own_folder(Path(folder), way_out=_WAY_OUT)
            except OSError as error:
                text = f"{folder!r} on node {ctx.node} cannot be made: {error}; make it writable"
                problems.append(text)
                return
            try:
                download_files(f"{uri}/", folder, caller)
                if not Path(folder, CONFIG_FILE).is_file():
                    problems.append(f"{uri} has no {CONFIG_FILE}; vLLM cannot load it")
            except DownloadError as error:
                problems.append(str(error))

        with ThreadPoolExecutor(self.parallel_adapters, "adapter") as pool:
            jobs = []
            for uri, folder in adapters.items():
                context = contextvars.copy_context()  # which a cancellation is looked up in
                jobs.append(pool.submit(context.run, functools.partial(fetch, uri, folder)))
        for job in jobs:
            job.result()
        self._failed(ctx, sorted(problems))

    def _failed(self, ctx: CallbackCtx, problems: Sequence[str]) -> None:
        if problems and self.required:
            raise DownloadError("; ".join(problems))
        for problem in problems:
            ctx.log.warning("an adapter cannot be served: %s", problem)

    @staticmethod
    def _caller(ctx: CallbackCtx) -> Caller:
        return Caller(ctx.log, "lora_prefetch", check_given_up)
