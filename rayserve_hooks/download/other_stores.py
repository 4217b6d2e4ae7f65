"""Google Cloud Storage, Azure and local folders, by obstore."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urlsplit

from rayserve_hooks.download import settings
from rayserve_hooks.download.caller import STANDALONE, Caller
from rayserve_hooks.download.reader import (
    BREAKS,
    BUSY,
    STALLS,
    AnswerError,
    Parts,
    Span,
    StalledError,
    resumed,
)
from rayserve_hooks.download.s3 import bare, known
from rayserve_hooks.download.store_errors import CHANGED, message_of, native
from rayserve_hooks.download.stores import ANONYMOUS, RemoteFile, Source
from rayserve_hooks.errors import DownloadError

if TYPE_CHECKING:
    import ssl

    from obstore import GetOptions
    from obstore.store import ObjectStore

_AZURE_HOSTS = {
    "azure": (".blob.core.windows.net", ".dfs.core.windows.net"),
    "abfss": (".dfs.core.windows.net",),
}
_AZURE_CREDENTIALS = re.compile(
    r"AZURE_(STORAGE_)?(ACCOUNT_KEY|ACCESS_KEY|MASTER_KEY|SAS_KEY|SAS_TOKEN|TOKEN)$"
)
_SIGNED_FOR = timedelta(minutes=5)
# Small enough that a buffer is reused: larger ones take longer to allocate than to fill.
CHUNK_BYTES = 2**16
# 429, 5xx, resets and timeouts of a listing; those of bodies are repeated here.
RETRIES: dict[str, Any] = {"max_retries": 3}


class OtherSource(Source):
    """A folder of a store that obstore reads."""

    def __init__(self, uri: str, caller: Caller = STANDALONE) -> None:
        super().__init__(uri, caller)
        rest = uri.partition("://")[2].removeprefix(ANONYMOUS)
        self.bucket, _, path = rest.partition("/")
        self.prefix = path.removesuffix("/")
        if self.scheme in _AZURE_HOSTS:
            self.container, _, host = self.bucket.partition("@")
            self.account = host.partition(".")[0]
            if not (self.container and self.account and host.endswith(_AZURE_HOSTS[self.scheme])):
                raise DownloadError(
                    f"{self.shown_uri} names no Azure container; write "
                    f"{self.scheme}://container@account{_AZURE_HOSTS[self.scheme][0]}/path"
                )
        elif self.scheme == "gs" and not self.bucket:
            raise DownloadError(f"{self.shown_uri} names no bucket; write gs://bucket/path")
        self._proxy = None if self.scheme == "file" else settings.proxy_of_others(self._endpoint)
        self.store = self._open(self._list_retries())
        self._bytes_store = self._open({"max_retries": 0})

    @staticmethod
    def _list_retries() -> dict[str, Any]:
        return {**RETRIES, "retry_timeout": timedelta(seconds=2 * settings.stall_s())}

    @property
    def _endpoint(self) -> str:
        """Where the objects are, without bucket or container."""
        if self.scheme == "gs":
            return gcs_endpoint() or "https://storage.googleapis.com"
        return azure_endpoint() or f"https://{self.account}.blob.core.windows.net"

    def _open(self, retries: Any) -> ObjectStore:
        from obstore.store import AzureStore, GCSStore, LocalStore

        prefix = self.prefix or None
        if prefix is not None and self.scheme != "file":
            names = self.prefix.split("/")
            if {"", ".", ".."} & set(names):
                raise DownloadError(
                    f"{self.shown_uri} has a folder with an empty name, '.' or '..', which this "
                    "store's client cannot read; copy the model to another folder"
                )
        limit_s = settings.stall_s()
        client: dict[str, Any] = {
            "connect_timeout": "5s",
            "read_timeout": timedelta(seconds=limit_s),
            # Of a whole request; a body that is merely slow goes on with the next one.
            "timeout": timedelta(seconds=limit_s + 1),
        }
        with native(), settings.without_empty_variables():
            if self.scheme == "file":
                return LocalStore(prefix=f"/{self.prefix}")
            client["allow_http"] = self._endpoint.startswith("http://")
            client |= settings.proxy_options(self._proxy)
            options: dict[str, Any] = {"client_options": client, "retry_config": retries}
            if self.scheme == "gs":
                if (endpoint := gcs_endpoint()) is not None:
                    options["base_url"] = endpoint.rstrip("/")
                if self.anonymous:
                    options["skip_signature"] = True
                return GCSStore(self.bucket, prefix=prefix, **options)
            configured = any(_AZURE_CREDENTIALS.match(name) for name in os.environ)
            options |= {} if configured else _azure_identity()
            return AzureStore(self.container, prefix=prefix, account_name=self.account, **options)

    def _pages(self) -> Iterator[list[RemoteFile]]:
        try:
            for batch in self.store.list(chunk_size=1000):
                yield [self._remote(meta) for meta in batch]
        except Exception as error:  # obstore raises classes of its own per store
            if self._proxy is None or "HTTP error" not in (text := message_of(error)):
                raise
            raise AnswerError(self._through(text)) from error

    def _object(self, name: str) -> Iterator[RemoteFile]:
        with contextlib.suppress(FileNotFoundError):
            yield self._remote(self.store.head(name))

    def _through(self, text: str) -> str:
        return text if self._proxy is None else f"the proxy {self._proxy.shown!r}: {text}"

    @staticmethod
    def _remote(meta: Mapping[str, Any]) -> RemoteFile:
        etag = known(meta["e_tag"])
        version = etag or meta["last_modified"].isoformat()
        return RemoteFile(meta["path"], meta["size"], etag, version)

    @property
    def _drops_slashes(self) -> bool:
        return True

    def _is_folder(self, file: RemoteFile) -> bool:
        """Return whether the store has no object of that very name, as a marker ends in a slash."""
        if self.scheme == "file":
            return False
        try:
            for _ in self._supervised(lambda: [self.store.head(file.path)], f"{file.path!r}"):
                return False
        except FileNotFoundError:
            return True
        return False

    def parts(self, file: RemoteFile, span: Span) -> Parts:
        what = f"cannot fetch {file.path!r} of {self.shown_uri}"
        body = functools.partial(self._body, file)
        with contextlib.closing(resumed(what, span, body, self.stopped)) as parts:
            yield from parts

    def _body(self, file: RemoteFile, span: Span) -> Iterator[memoryview]:
        start, end = span
        limit_s = settings.stall_s()
        while start < end:
            asked = arrived = time.monotonic()
            first = start
            try:
                for chunk in self._chunks(file, (start, end)):
                    arrived = time.monotonic()
                    start += len(chunk)
                    yield chunk
                    arrived = max(arrived, time.monotonic() - limit_s / 2)
                return
            except AnswerError:
                raise
            except Exception as error:  # obstore raises classes of its own per store
                text = message_of(error)
                tries = _tries(error, text)
                text = self._through(text) if "HTTP error" in text else text
                if "TimedOut" in text or "timed out" in text:
                    now = time.monotonic()
                    enough = start - first >= settings.LEAST_RATE * limit_s
                    if enough and now - arrived < limit_s / 2:
                        continue
                    got, seconds = start - first, now - asked
                    raise StalledError(
                        f"{got:,} bytes came in {seconds:.1f} s: {text}", tries=STALLS
                    ) from error
                raise AnswerError(text, tries=tries) from error

    def _chunks(self, file: RemoteFile, span: Span) -> Iterator[memoryview]:
        import obstore

        options: GetOptions = {}
        if file.etag is not None:
            options["if_match"] = file.etag
        if span != (0, file.size):
            options["range"] = span
        with native():
            result = obstore.get(self._bytes_store, file.path, options=options)
            etag, size = known(result.meta["e_tag"]), result.meta["size"]
            changed = None not in (etag, file.etag) and bare(str(etag)) != bare(str(file.etag))
            if changed or size != file.size:
                detail = f"the version {etag!r} of {size} bytes"
                raise AnswerError(
                    f"the store sends {detail}, but has listed {file.etag!r} of {file.size}; "
                    f"{CHANGED}, or look for a proxy that encodes it"
                )
            chunks = iter(result.stream(CHUNK_BYTES))
        while True:
            with native():
                chunk = next(chunks, None)
            if chunk is None:
                return
            if self.stopped.is_set():
                raise AnswerError("the download has ended")
            yield memoryview(chunk)

    def can_head(self) -> bool:
        return self.scheme != "file"

    def head(self, file: RemoteFile) -> Mapping[str, str]:
        import urllib.request

        # Azure signs permissions instead of methods; reading is the permission of GET.
        url = self.readable_url_of(file.path, "HEAD" if self.scheme == "gs" else "GET")
        # The endpoint is the operator's own setting, and https by default.
        request = urllib.request.Request(url, method="HEAD")  # noqa: S310
        scheme = urlsplit(url).scheme
        proxies = {scheme: self._proxy.url} if self._proxy else {}
        handlers: list[Any] = [urllib.request.ProxyHandler(proxies), _no_redirects()]
        if scheme == "https":
            handlers.append(urllib.request.HTTPSHandler(context=self._tls))
        opener = urllib.request.build_opener(*handlers)
        limit_s = min(settings.stall_s(), 10.0)
        with opener.open(request, timeout=limit_s) as response:
            return {name.lower(): value for name, value in response.headers.items()}

    def readable_url_of(self, path: str, method: Literal["GET", "HEAD"] = "GET") -> str:
        """Return an object's URL, signed unless the store is read anonymously."""
        if self.anonymous:
            key = "/".join(filter(None, [self.prefix, path]))
            return f"{self._endpoint.rstrip('/')}/{self.bucket}/{quote(key, safe='/~')}"
        import obstore

        store: Any = self.store
        with native():
            return obstore.sign(store, method, path, _SIGNED_FOR)

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        return settings.tls_context(None)


def gcs_endpoint() -> str | None:
    """Return the URL of a server in place of Google's, as Google's own clients read it."""
    host = (os.environ.get("STORAGE_EMULATOR_HOST") or "").strip()
    if not host:
        return None
    url = host if "://" in host else f"http://{host}"
    settings.check_endpoint("STORAGE_EMULATOR_HOST", url)
    return url


def azure_endpoint() -> str | None:
    return os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT")


def _azure_identity() -> dict[str, Any]:
    """Use Azure's default credentials, as Ray does; without azure-identity obstore's own."""
    try:
        from obstore.auth.azure import AzureCredentialProvider
    except ImportError:
        return {}
    return {"credential_provider": AzureCredentialProvider()}


def _tries(error: Exception, text: str) -> int:
    from obstore.exceptions import GenericError

    if re.search(r"\b(429|500|502|503|504) [A-Z]", text):
        return BUSY
    status = re.search(r"status code: \d|\b4\d\d [A-Z]", text)
    passing = isinstance(error, GenericError) and "HTTP error" in text and not status
    return BREAKS if passing and "InvalidCertificate" not in text else 1


def _no_redirects() -> Any:
    """Return a handler that makes every redirect an error: no other host is believed."""
    import urllib.request

    class NoRedirects(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: object) -> None:
            return None

    return NoRedirects()
