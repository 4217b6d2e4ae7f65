"""What the environment says about stores: read in one place, so that it means one thing."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from rayserve_hooks.errors import DownloadError, describe

if TYPE_CHECKING:
    import ssl

STALL_VARIABLE = "RAYSERVE_HOOKS_STALL_S"
_STALL_S = 30.0
LEAST_RATE = 1024
"""Bytes per second; an answer that is slower for as long as the limit on a stall has stalled."""

_PREFIXES = ("AWS_", "AZURE_", "GOOGLE_")
_NAMES = ("STORAGE_EMULATOR_HOST", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
_MANY_LINES = ("GOOGLE_SERVICE_ACCOUNT_KEY",)  # JSON
_hiding = threading.Lock()


def stall_s() -> float:
    """Return after how many seconds without bytes, or with too few, a request is repeated."""
    text = os.environ.get(STALL_VARIABLE) or str(_STALL_S)
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < float("inf"):
            return seconds
    raise DownloadError(f"{STALL_VARIABLE} is {text!r}; write a number of seconds, as in '30'")


def _of_stores(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_PREFIXES) or name in _NAMES
    }


def check(scheme: str) -> None:
    """Raise a `DownloadError` if a variable for a scheme's stores holds what none can mean."""
    prefixes = {"s3": ("AWS_",), "gs": ("GOOGLE_", "STORAGE_")}
    wanted = prefixes.get(scheme, ("AZURE_",))
    for name, value in _of_stores(os.environ).items():
        if not name.startswith(wanted):
            continue
        if not _printable(value) and name not in _MANY_LINES:
            # The value may be a secret, so it is not shown.
            raise DownloadError(
                f"{name} holds a line break or another control character; write it without, also "
                "at its end"
            )
        if name in _ENDPOINTS and value:
            check_endpoint(name, value)


def quoted_in(error: BaseException) -> list[str]:
    """Return the variables of stores whose value an error's text has, as words of their own."""
    text = str(error).replace("[Errno ", "[Errno-")
    return sorted(
        name
        for name, value in _of_stores(os.environ).items()
        if value.strip() and re.search(rf"(?<![\w/.-]){re.escape(value)}(?![\w/-])", text)
    )


def check_endpoint(name: str, value: str) -> None:
    with contextlib.suppress(ValueError):  # of the port
        parts = urlsplit(value)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return
    shown = value.rpartition("@")[2]
    raise DownloadError(
        f"{name} is {shown!r}, which is no URL; write it with its scheme, as in 'http://host:9000'"
    )


def _printable(text: str) -> bool:
    return not any(ord(char) < 32 or ord(char) == 127 for char in text)


def check_credentials(where: str, *values: str | None) -> None:
    """Raise a `DownloadError` if credentials hold what cannot be in a header."""
    for value in values:
        if value and not (_printable(value) and value.isascii()):
            raise DownloadError(
                f"the credentials from {where} hold a control character or one outside of ASCII; "
                "write them without"
            )


@contextlib.contextmanager
def without_empty_variables() -> Iterator[None]:
    """Hide variables of stores that are set to nothing, as charts set them: they are unset.

    Native libraries read the process's environment themselves, and botocore does in many places;
    so they are taken out for the moment in which a client is made.
    """
    with _hiding:
        empty = [name for name, value in _of_stores(os.environ).items() if not value.strip()]
        hidden = {name: os.environ.pop(name) for name in empty}
        try:
            yield
        finally:
            for name, value in hidden.items():
                os.environ.setdefault(name, value)


def identity() -> tuple[object, ...]:
    """Return what changes whenever the settings of a client may have changed."""
    variables = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("AWS_") or name in (*_NAMES, "HOME")
    }
    files = [
        Path(variables.get(name) or default).expanduser()
        for name, default in (
            ("AWS_CONFIG_FILE", "~/.aws/config"),
            ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
        )
    ]
    return (*sorted(variables.items()), *map(_stamp, files))


def _stamp(file: Path) -> tuple[int, int, int] | None:
    with contextlib.suppress(OSError):
        status = file.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns
    return None


def certificates(configured: str | None, where: str) -> str | None:
    """Return the certificates to trust besides the system's, if a file is configured.

    Raises:
        DownloadError: It cannot be read.
    """
    if not configured:
        return None
    try:
        path = Path(configured).expanduser()
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return "\n".join(file.read_text() for file in files if file.is_file() or file == path)
    except (OSError, ValueError) as error:
        raise DownloadError(
            f"cannot read the certificates that {where} names: {describe(error)}; "
            "put the file on every node, or unset the variable"
        ) from error


def tls_context(extra: str | None, where: str = "AWS_CA_BUNDLE") -> ssl.SSLContext:
    """Return a context that trusts the system's certificates, and others if there are any."""
    import ssl

    with without_empty_variables():
        context = ssl.create_default_context()
    # The list that boto3 uses alone; a slim image may have none of its own.
    with contextlib.suppress(ImportError, OSError):
        import certifi

        context.load_verify_locations(certifi.where())
    if extra is not None:
        try:
            context.load_verify_locations(cadata=extra)
        except (ssl.SSLError, ValueError) as error:
            raise DownloadError(
                f"the file that {where} names holds no certificate: {describe(error)}; write one "
                "in PEM format there, or unset the variable"
            ) from error
    return context


class Proxy:
    """A proxy of the environment, as a URL of which the password is not shown."""

    def __init__(self, url: str) -> None:
        names = [name for name, value in os.environ.items() if value == url]
        names = [name for name in names if name.lower().endswith("_proxy")]
        url = url if "://" in url else f"http://{url.removeprefix('//')}"
        try:
            parts = urlsplit(url)
            self.host, self.port = parts.hostname or "", parts.port
        except ValueError:
            parts, self.host = urlsplit(""), ""
        self.url, self.scheme = url, parts.scheme
        scheme, _, rest = url.partition("://")
        self.shown = f"{scheme}://{rest.rpartition('@')[2].partition('/')[0]}"
        if not self.host or self.scheme not in ("http", "https"):
            raise DownloadError(
                f"{names[0] if names else 'a proxy variable'} is {self.shown!r}, which is no URL "
                "of an HTTP proxy; write it as in 'http://host:3128'"
            )
        self.port = self.port or (443 if self.scheme == "https" else 80)
        self.headers: dict[str, str] = {}
        if parts.username is not None:
            import base64

            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            encoded = base64.b64encode(user.encode()).decode()
            self.headers["Proxy-Authorization"] = f"Basic {encoded}"


def proxy_of_boto3(url: str) -> Proxy | None:
    """Return the proxy for a URL as boto3 chooses it: by the scheme's variable alone."""
    from botocore.utils import get_environ_proxies

    found = get_environ_proxies(url).get(urlsplit(url).scheme)
    return Proxy(found) if found else None


def proxy_of_others(url: str) -> Proxy | None:
    """Return the proxy for a URL as ``requests`` chooses it, for stores that are not S3's."""
    from urllib.request import proxy_bypass

    from requests.utils import get_environ_proxies, select_proxy

    # It forgets the port of an address, and the standard library, which sends the HEADs, does not.
    if proxy_bypass(urlsplit(url).netloc):
        return None
    found = select_proxy(url, get_environ_proxies(url))
    return Proxy(found) if found else None


def proxy_options(proxy: Proxy | None, only: str | None = None) -> dict[str, Any]:
    """Return obstore's options for a proxy or none, so that it does not choose by itself.

    Args:
        proxy: The proxy.
        only: Without a proxy, the one host that is reached: a redirect elsewhere fails.
    """
    if proxy is not None:
        return {"proxy_url": proxy.url}
    everything = "*,0.0.0.0/0,::/0"
    return {"proxy_url": "http://none.invalid", "proxy_excludes": only or everything}


@functools.cache
def reason(status: int) -> str:
    import http

    with contextlib.suppress(ValueError):
        return http.HTTPStatus(status).phrase
    return "Error"
