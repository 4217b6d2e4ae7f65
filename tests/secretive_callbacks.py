"""Callbacks whose failures show secrets in every way; importable in every process."""

from __future__ import annotations

import base64
import os
import urllib.parse
from dataclasses import dataclass
from typing import Any

from rayserve_hooks import CallbackCtx

TOKEN = "hf_Zq8/w+Kd 2xVt7'mN\u00e94"
"""What the tests give as a secret: with everything in it that is written in more than one way."""


@dataclass
class Settings:
    host: str
    token: str


class ShowsSecrets:
    """Raise an error from one, while handling one, with a note, a group, bytes and a dataclass.

    Args:
        hf_token: The secret of the arguments.
        hook: The hook that fails.
        remote: Whether it fails on another node than the replica's own.
    """

    def __init__(self, hf_token: str, hook: str = "on_before_init", remote: bool = False) -> None:
        self.secret = hf_token
        self.hook, self.remote = hook, remote

    def on_before_init(self, ctx: CallbackCtx) -> None:
        self._fail("on_before_init", ctx)

    def on_before_download(self, ctx: CallbackCtx) -> None:
        self._fail("on_before_download", ctx)

    def on_init_failed(self, ctx: CallbackCtx, error: BaseException) -> None:
        raise RuntimeError(f"cannot log out {self.secret}") from error

    def _fail(self, hook: str, ctx: CallbackCtx) -> None:
        if hook == self.hook and ctx.node.is_local != self.remote:
            raise_with(self.secret, os.environ.get("A_PASSWORD", ""))


def raise_with(*secrets: Any) -> None:
    try:
        try:
            raise KeyError(Settings("host", secrets[0]), *map(str.encode, secrets))
        except KeyError:
            raise ConnectionError(  # noqa: B904 - with a context
                [f"https://me:{urllib.parse.quote(s, safe='')}@host/x?sig={s}" for s in secrets]
            )
    except ConnectionError as error:
        members = [ValueError(("Authorization", f"Bearer {secret}")) for secret in secrets]
        group = ExceptionGroup("all of them", [*members, error])
        group.add_note(f"Basic {base64.b64encode(('me:' + secrets[0]).encode()).decode()}")
        raise RuntimeError(f"401 for {', '.join(secrets)}") from group
