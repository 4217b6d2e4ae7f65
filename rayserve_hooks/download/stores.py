"""Object stores by URI: opened as Ray opens them, and listed.

URI forms, credentials, endpoint variables and the ``anonymous@`` convention are Ray's
(``S3FileSystem``, ``PyArrowFileSystem``, Ray 2.60). Nothing is imported before a store is opened.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urlsplit

from rayserve_hooks.download.caller import STANDALONE, Caller
from rayserve_hooks.errors import DownloadError, describe

if TYPE_CHECKING:
    import ssl

    from obstore.store import ClientConfig, ObjectStore, RetryConfig

STATE_FOLDER = ".rayserve_hooks"
"""Where this package keeps markers and partial files, in the folder it downloads to."""

# A request may take as long as bytes arrive; obstore's default limit is 30 s for all of it.
_CLIENT: ClientConfig = {"connect_timeout": "10s", "read_timeout": "30s", "timeout": "1h"}
# 429, 5xx, resets and timeouts: exponential back-off from 0.1 to 15 s with jitter, 3 minutes.
_RETRIES: RetryConfig = {"max_retries": 10}
_AZURE_HOSTS = {
    "azure": (".blob.core.windows.net", ".dfs.core.windows.net"),
    "abfss": (".dfs.core.windows.net",),
}
_AZURE_CREDENTIALS = re.compile(
    r"AZURE_(STORAGE_)?(ACCOUNT_KEY|ACCESS_KEY|MASTER_KEY|SAS_KEY|SAS_TOKEN|TOKEN)$"
)
_SIGNED_FOR = timedelta(minutes=5)
ANONYMOUS = "anonymous@"
"""Before a bucket's name: send no credentials."""


@dataclass(frozen=True)
class RemoteFile:
    """An object of a listing, its path relative to the store's URI."""

    path: str
    size: int  # in bytes
    etag: str | None  # as the store sends it, quotes included
    version: str  # changes whenever the content does: the ETag, or else the time of change


@dataclass(frozen=True)
class Source:
    """An open store: the folder behind a URI, read for a caller."""

    uri: str
    store: ObjectStore
    caller: Caller = STANDALONE
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    @property
    def scheme(self) -> str:
        return self.uri.partition("://")[0]

    @property
    def shown_uri(self) -> str:
        """The URI as it may be logged."""
        return without_secrets(self.uri)

    @property
    def anonymous(self) -> bool:
        return self.uri.startswith(f"{self.scheme}://{ANONYMOUS}")

    def url_of(self, path: str, region: str | None = None) -> str:
        """Return the unsigned URL of an object of S3 or Google Cloud Storage."""
        if self.scheme == "s3":
            region = region or aws_region() or "us-east-1"
            endpoint = s3_endpoint() or f"https://s3.{region}.amazonaws.com"
        else:
            endpoint = gcs_endpoint() or "https://storage.googleapis.com"
        rest = self.uri.partition("://")[2].removeprefix(ANONYMOUS)
        bucket, _, prefix = rest.partition("/")
        key = "/".join(filter(None, [prefix.strip("/"), path]))
        return f"{endpoint.rstrip('/')}/{bucket}/{quote(key, safe='/~')}"

    def readable_url_of(self, path: str, method: Literal["GET", "HEAD"] = "GET") -> str:
        """Return an object's URL, signed unless the store is read anonymously."""
        if self.anonymous:
            return self.url_of(path)
        import obstore

        store: Any = self.store
        return obstore.sign(store, method, path, _SIGNED_FOR)

    @property
    def tls(self) -> ssl.SSLContext:
        """The TLS context with which Python's own clients trust whom obstore trusts here."""
        with self._lock:  # reading all certificates is slow: once, not in each thread
            return self._tls

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        import ssl

        context = ssl.create_default_context()
        if self.scheme == "s3" and (certificates := _s3_certificates()) is not None:
            context.load_verify_locations(cadata=certificates)
        return context

    def list_files(self) -> dict[str, RemoteFile]:
        """Return the objects below the URI by their path.

        Raises:
            DownloadError: The store refused, there is no object, or one has a path that would
                leave the folder it is downloaded to.
        """
        try:
            found = [meta for batch in self.store.list(chunk_size=1000) for meta in batch]
        except Exception as error:  # obstore raises classes of its own per store
            raise failure(f"cannot list {self.uri}", error) from error
        files = {}
        for meta in found:
            path = meta["path"]
            parts = [part for part in path.split("/") if part not in ("", ".")]
            if path.endswith("/") or parts[:1] == [STATE_FOLDER]:
                continue
            if path.startswith("/") or ".." in parts or "\0" in path:
                raise DownloadError(
                    f"{self.shown_uri} holds an object {path!r}, which would leave the folder it "
                    "goes to; rename it"
                )
            version = meta["e_tag"] or meta["last_modified"].isoformat()
            files[path] = RemoteFile(path, meta["size"], meta["e_tag"], version)
        if not files:
            raise DownloadError(f"{self.shown_uri} holds no object; check bucket and path")
        return files

    def read(self, path: str) -> bytes:
        """Read a small object."""
        try:
            return bytes(self.store.get(path).bytes())
        except Exception as error:  # obstore raises classes of its own per store
            raise failure(f"cannot fetch {path!r} of {self.uri}", error) from error


def open_source(uri: str, caller: Caller = STANDALONE) -> Source:
    """Open the store behind a URI; no request is made yet.

    Args:
        uri: ``s3://bucket/path``, ``gs://bucket/path``, both also with ``anonymous@`` before the
            bucket, ``azure://container@account.blob.core.windows.net/path`` or
            ``abfss://container@account.dfs.core.windows.net/path``.
        caller: The caller of the download.

    Raises:
        DownloadError: The URI is none of these, or there are no credentials.
    """
    # The prefix selects Ray's slow client; here there is one client for all.
    uri = uri.removeprefix("pyarrow-")
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise DownloadError(
            f"downloading {without_secrets(uri)} needs the package 'obstore'; install "
            "'rayserve_hooks[download]' on every node"
        ) from error
    scheme, _, rest = uri.partition("://")
    try:
        if scheme in _AZURE_HOSTS:
            return Source(uri, _open_azure(uri, scheme), caller)
        options: dict[str, Any] = {"client_options": _CLIENT, "retry_config": _RETRIES}
        if rest.startswith(ANONYMOUS):
            rest = rest.removeprefix(ANONYMOUS)
            options["skip_signature"] = True
        if scheme == "s3":
            options |= _s3_options(anonymous="skip_signature" in options)
        elif scheme == "gs" and (endpoint := gcs_endpoint()) is not None:
            options |= {"base_url": endpoint.rstrip("/"), "client_options": _client(endpoint)}
        elif scheme == "file":
            options = {}
        return Source(uri, from_url(f"{scheme}://{rest}", **options), caller)
    except DownloadError:
        raise
    except Exception as error:  # obstore and botocore raise classes of their own
        raise failure(f"cannot open {uri}", error, check="the URI and the credentials") from error


def aws_region() -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


def s3_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def gcs_endpoint() -> str | None:
    """Return the URL of a server in place of Google's, as Google's own clients read it."""
    host = os.environ.get("STORAGE_EMULATOR_HOST")
    return host if host is None or "://" in host else f"http://{host}"


def _client(endpoint: str | None) -> dict[str, Any]:
    return {**_CLIENT, "allow_http": (endpoint or "").startswith("http://")}


def _s3_options(*, anonymous: bool) -> dict[str, Any]:
    client = _client(s3_endpoint())
    if not client["allow_http"] and (certificates := _s3_certificates()) is not None:
        client["root_certificate"] = certificates
    options: dict[str, Any] = {"region": aws_region(), "endpoint": s3_endpoint()}
    if not anonymous and "AWS_ACCESS_KEY_ID" not in os.environ:
        options |= _boto3_credentials()
    options["client_options"] = client
    return {name: value for name, value in options.items() if value is not None}


def _s3_certificates() -> str | None:
    """Return the certificates to trust besides the system's, from the variables of boto3."""
    for variable in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        if file := os.environ.get(variable):
            try:
                return Path(file).read_text()
            except OSError as error:
                raise DownloadError(
                    f"cannot read the certificates that {variable} names: {describe(error)}; "
                    "put the file on every node, or unset the variable"
                ) from error
    return None


def _boto3_credentials() -> dict[str, Any]:
    """Use boto3's credential chain: profiles, SSO, roles; without boto3 obstore's shorter one."""
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return {}
    session = boto3.Session()
    if session.get_credentials() is None:
        raise DownloadError(
            "boto3 finds no AWS credentials; set AWS_ACCESS_KEY_ID or AWS_PROFILE, or write "
            "s3://anonymous@bucket for a public bucket"
        )
    provider = Boto3CredentialProvider(session)
    return {"credential_provider": provider, "region": aws_region() or session.region_name}


def _open_azure(uri: str, scheme: str) -> ObjectStore:
    from obstore.store import AzureStore

    parts = urlsplit(uri)
    container, _, host = parts.netloc.partition("@")
    account = host.partition(".")[0]
    if not container or not account or not host.endswith(_AZURE_HOSTS[scheme]):
        raise DownloadError(
            f"{without_secrets(uri)} names no Azure container; write "
            f"{scheme}://container@account{_AZURE_HOSTS[scheme][0]}/path"
        )
    configured = any(_AZURE_CREDENTIALS.match(name) for name in os.environ)
    endpoint = os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT")
    return AzureStore(
        container,
        account_name=account,
        prefix=parts.path.strip("/") or None,
        client_options=_client(endpoint),  # type: ignore[arg-type] # a TypedDict, merged
        retry_config=_RETRIES,
        **({} if configured else _azure_identity()),
    )


def _azure_identity() -> dict[str, Any]:
    """Use Azure's default credentials, as Ray does; without azure-identity obstore's own."""
    try:
        from obstore.auth.azure import AzureCredentialProvider
    except ImportError:
        return {}
    return {"credential_provider": AzureCredentialProvider()}


def failure(what: str, error: Exception, check: str | None = None) -> DownloadError:
    """Return a store's error as ours: its own message, and what to check if it does not say."""
    from obstore.exceptions import PermissionDeniedError, PreconditionError, UnauthenticatedError

    text = message_of(error)
    if isinstance(error, PreconditionError):
        advice = "the object has changed under the download; try again when its upload is over"
    elif isinstance(error, PermissionDeniedError | UnauthenticatedError) or "403 Forbid" in text:
        advice = "check the credentials and whether they may list and read there"
    elif isinstance(error, FileNotFoundError) or "404 Not Found" in text:
        advice = "check bucket, path and endpoint"
    elif "InvalidCertificate" in text:
        advice = (
            "check the server's certificate, and that who signed it is among the system's, in "
            "SSL_CERT_FILE or, for S3, in AWS_CA_BUNDLE"
        )
    else:
        advice = f"check {check or 'endpoint, region, credentials and the network'}"
    return DownloadError(f"{without_secrets(what)}: {text}; {advice}")


def message_of(error: Exception) -> str:
    """Return the store's own message, without obstore's dump, request ids and key ids."""
    text, _, dump = describe(error).partition("\n\nDebug source")
    matches = [re.search(f"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message")]
    if any(matches):
        text = text.partition("<")[0] + ": ".join(match[1] for match in matches if match)
    elif "HTTP error" in text and (reason := _REASON.search(dump)):
        # The store sent no response, and only the dump has the reason.
        text = ": ".join(filter(None, [text, *reason.groups()]))
    return " ".join(without_secrets(text).split()).rstrip(".")


_REASON = re.compile(
    r"""
    (?:message|error):\s"([^"]+)"  # the system's: refused, reset, no such host
    | error:\s(\w+),              # of the body
    | (Invalid\w+)\(\s*(\w+)      # of TLS
    | source:\s(TimedOut)
    | hyper::Error\(\s*(\w+)(?:,\s*\)|\(\s*(\w+))
    """,
    re.VERBOSE,
)


def without_secrets(text: str) -> str:
    """Remove what may hold secrets from a text: query strings, and passwords in URLs."""
    text = re.sub(r"(\w+://[^\s?]*)\?[^\s)>\"']*", r"\1", text)
    return re.sub(r"://[^/@\s]*:[^/@\s]*@", "://", text)
