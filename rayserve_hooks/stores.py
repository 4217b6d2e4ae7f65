"""Object stores by URI: opened as Ray opens them, listed, and asked for checksums.

URI forms, credentials, endpoint variables and the ``anonymous@`` convention are Ray's
(``S3FileSystem``, ``PyArrowFileSystem``, Ray 2.60). Nothing is imported before a store is opened.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import logging
import os
import re
import urllib.parse
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from rayserve_hooks.errors import DownloadError, describe
from rayserve_hooks.trace import LOGGER_NAME

if TYPE_CHECKING:
    import urllib.request

    from obstore.store import ClientConfig, ObjectStore, RetryConfig

logger = logging.getLogger(LOGGER_NAME)

STATE_FOLDER = ".rayserve_hooks"
"""Where this package keeps markers and partial files, in the folder it downloads to."""

# A request may take as long as it goes on; obstore's own limit is 30 s for all of it.
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
_READ_BYTES = 2**20
_HEAD_TIMEOUT_S = 30


@dataclass(frozen=True)
class RemoteFile:
    """An object of a listing.

    Args:
        path: Relative to the store's URI.
        size: In bytes.
        etag: As the store gives it, quotes included; None where it gives none.
        version: Changes whenever the content does: the ETag, or else the time of change.
    """

    path: str
    size: int
    etag: str | None
    version: str


@dataclass(frozen=True)
class Head:
    """What the store says of an object's content.

    Args:
        checksum: Of the full object, as ``"<algorithm>:<value>"``; None if there is none.
        etag_is_md5: False for objects encrypted with a key, whose ETag is no hash of the content.
    """

    checksum: str | None
    etag_is_md5: bool


class _Hash(Protocol):
    def update(self, data: Any, /) -> None: ...
    def digest(self) -> bytes: ...


class _Crc:
    """A CRC function as a hash object."""

    def __init__(self, function: Callable[[Any, int], int], digest_bytes: int) -> None:
        self._function, self._digest_bytes, self._value = function, digest_bytes, 0

    def update(self, data: Any, /) -> None:
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._digest_bytes, "big")


def new_hash(algorithm: str) -> _Hash | None:
    """Make the hash object of a checksum's algorithm; None where its library is missing."""
    if algorithm in ("md5", "sha1", "sha256"):
        return hashlib.new(algorithm, usedforsecurity=False)
    try:
        from awscrt import checksums
    except ImportError:
        return _Crc(zlib.crc32, 4) if algorithm == "crc32" else None
    return _Crc(getattr(checksums, algorithm), 8 if algorithm == "crc64nvme" else 4)


def checksum_text(algorithm: str, digest: bytes) -> str:
    """Write a digest as the stores do: MD5 in hex, as in ETags, everything else in base64."""
    value = digest.hex() if algorithm == "md5" else base64.b64encode(digest).decode()
    return f"{algorithm}:{value}"


def checksum_of(content: Path | bytes | bytearray, algorithm: str) -> str | None:
    """Compute a checksum; a file is not mapped, so that its pages do not count as our memory."""
    hashing = new_hash(algorithm)
    if hashing is None:
        return None
    if not isinstance(content, Path):
        hashing.update(content)
    else:
        buffer = memoryview(bytearray(_READ_BYTES))
        with content.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                hashing.update(buffer[:count])
    return checksum_text(algorithm, hashing.digest())


@dataclass(frozen=True)
class Source:
    """An open store: the folder behind a URI."""

    uri: str
    store: ObjectStore

    @property
    def is_s3(self) -> bool:
        return self.uri.startswith("s3://")

    def list_files(self) -> dict[str, RemoteFile]:
        """List the objects below the URI.

        Returns:
            The objects by their path.

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
                raise _unsafe(self.uri, repr(path))
            version = meta["e_tag"] or meta["last_modified"].isoformat()
            files[path] = RemoteFile(path, meta["size"], meta["e_tag"], version)
        if not files:
            raise DownloadError(f"{_safe(self.uri)} holds no object; check bucket and path")
        return files

    def read(self, path: str) -> bytes:
        """Read a small object.

        Raises:
            DownloadError: The store refused.
        """
        try:
            return bytes(self.store.get(path).bytes())
        except Exception as error:  # obstore raises classes of its own per store
            raise failure(f"cannot fetch {path!r} of {self.uri}", error) from error

    def head(self, file: RemoteFile) -> Head | None:
        """Ask S3 for the checksum of an object, which no listing holds.

        Returns:
            None where S3 cannot be asked: another store, no boto3, no permission for it.
        """
        if not self.is_s3:
            return None
        import urllib.request  # costs more than the rest of this module

        try:
            request = self._head_request(file.path)
            if request is None:
                return None
            # The endpoint is the operator's own setting, and https by default.
            with urllib.request.urlopen(request, timeout=_HEAD_TIMEOUT_S) as answer:  # noqa: S310
                headers = answer.headers
        except Exception as error:  # not worth a failed download, whatever botocore raises
            text = _message(error)
            logger.warning("no checksum for %s of %s: %s", file.path, _safe(self.uri), text)
            return None
        if headers.get("ETag", file.etag) != file.etag:
            return None  # another version; the ranges, which are pinned to ours, will say so
        encrypted = headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
        own_key = "x-amz-server-side-encryption-customer-algorithm" in headers
        return Head(_full_checksum(headers), etag_is_md5=not (encrypted or own_key))

    def _head_request(self, path: str) -> urllib.request.Request | None:
        """Make the request, at the address that obstore uses.

        Not with a client of boto3: making one takes a tenth of a second in which no other thread
        runs, and here it would be for one kind of request.
        """
        import urllib.request

        bucket, _, prefix = self.uri.removeprefix("s3://").removeprefix("anonymous@").partition("/")
        key = "/".join(filter(None, [prefix.strip("/"), path]))
        anonymous = self.uri.startswith("s3://anonymous@")
        session = None if anonymous else self._session
        if session is None and not anonymous:
            return None
        region = _region() or (session and session.region_name) or "us-east-1"
        endpoint = _s3_endpoint() or f"https://s3.{region}.amazonaws.com"
        url = f"{endpoint.rstrip('/')}/{bucket}/{urllib.parse.quote(key, safe='/~')}"
        headers = {"x-amz-checksum-mode": "ENABLED"}
        if session is not None:
            from botocore.auth import S3SigV4Auth
            from botocore.awsrequest import AWSRequest

            signed = AWSRequest("HEAD", url, headers=headers)
            S3SigV4Auth(session.get_credentials(), "s3", region).add_auth(signed)
            headers = dict(signed.headers.items())
        return urllib.request.Request(url, method="HEAD", headers=headers)  # noqa: S310 - as above

    @functools.cached_property
    def _session(self) -> Any:
        try:
            import boto3
        except ImportError:
            logger.warning(
                "%s: some files are verified by size only, because their checksum takes 'boto3'; "
                "install 'rayserve_hooks[download]' on every node",
                self.uri,
            )
            return None
        return boto3.Session()


def open_source(uri: str) -> Source:
    """Open the store behind a URI; no request is made yet.

    Args:
        uri: ``s3://bucket/path``, ``gs://bucket/path``, both also with ``anonymous@`` before the
            bucket, ``azure://container@account.blob.core.windows.net/path`` or
            ``abfss://container@account.dfs.core.windows.net/path``.

    Raises:
        DownloadError: The URI is none of these, or there are no credentials.
    """
    # Ray chooses its slow client by this prefix; here there is one client for all.
    uri = uri.removeprefix("pyarrow-")
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise DownloadError(
            f"downloading {_safe(uri)} needs the package 'obstore'; install "
            "'rayserve_hooks[download]' on every node"
        ) from error
    scheme, _, rest = uri.partition("://")
    try:
        if scheme in _AZURE_HOSTS:
            return Source(uri, _open_azure(uri, scheme))
        options: dict[str, Any] = {"client_options": _CLIENT, "retry_config": _RETRIES}
        if rest.startswith("anonymous@"):
            rest = rest.removeprefix("anonymous@")
            options["skip_signature"] = True
        if scheme == "s3":
            options |= _s3_options(anonymous="skip_signature" in options)
        elif scheme == "file":
            options = {}
        return Source(uri, from_url(f"{scheme}://{rest}", **options))
    except DownloadError:
        raise
    except Exception as error:  # obstore and botocore raise classes of their own
        raise failure(f"cannot open {uri}", error, check="the URI and the credentials") from error


def _region() -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


def _s3_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _s3_options(*, anonymous: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"region": _region()}
    endpoint = _s3_endpoint()
    if endpoint:
        options["endpoint"] = endpoint
        options["client_options"] = {**_CLIENT, "allow_http": endpoint.startswith("http://")}
    if not anonymous and "AWS_ACCESS_KEY_ID" not in os.environ:
        options |= _boto3_credentials(options["region"])
    return {name: value for name, value in options.items() if value is not None}


def _boto3_credentials(region: str | None) -> dict[str, Any]:
    """Take boto3's chain of credentials: profiles, SSO, roles; without boto3 obstore's shorter."""
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
    return {"credential_provider": provider, "region": region or session.region_name}


def _open_azure(uri: str, scheme: str) -> ObjectStore:
    from obstore.store import AzureStore

    parts = urlsplit(uri)
    container, _, host = parts.netloc.partition("@")
    account = host.partition(".")[0]
    if not container or not account or not host.endswith(_AZURE_HOSTS[scheme]):
        raise DownloadError(
            f"{_safe(uri)} names no Azure container; write "
            f"{scheme}://container@account{_AZURE_HOSTS[scheme][0]}/path"
        )
    options: dict[str, Any] = {}
    if not any(_AZURE_CREDENTIALS.match(name) for name in os.environ):
        options |= _azure_identity()
    endpoint = os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT", "")
    client = {**_CLIENT, "allow_http": endpoint.startswith("http://")}
    return AzureStore(
        container,
        account_name=account,
        prefix=parts.path.strip("/") or None,
        client_options=client,  # type: ignore[arg-type] # a TypedDict, merged
        retry_config=_RETRIES,
        **options,
    )


def _azure_identity() -> dict[str, Any]:
    """Take Azure's default credentials, as Ray does; without azure-identity obstore's own."""
    try:
        from obstore.auth.azure import AzureCredentialProvider
    except ImportError:
        return {}
    return {"credential_provider": AzureCredentialProvider()}


def _full_checksum(headers: Mapping[str, str]) -> str | None:
    """Pick the first checksum of the whole object that can be computed here, fastest first."""
    for algorithm in ("crc64nvme", "crc32c", "crc32", "sha256", "sha1"):
        value = headers.get(f"x-amz-checksum-{algorithm}")
        # A checksum of checksums ends in the number of parts; some stores do not send the type.
        kind = headers.get("x-amz-checksum-type", "FULL_OBJECT")
        full = kind == "FULL_OBJECT" and "-" not in str(value)
        if value and full and new_hash(algorithm) is not None:
            return f"{algorithm}:{value}"
    return None


def failure(what: str, error: Exception, check: str | None = None) -> DownloadError:
    """Turn a store's error into ours: its own message, and what to check.

    Args:
        what: What could not be done.
        error: What obstore raised.
        check: What to check, where the error itself does not tell.
    """
    from obstore.exceptions import (
        PermissionDeniedError,
        PreconditionError,
        UnauthenticatedError,
    )

    text = _message(error)
    if isinstance(error, PreconditionError):
        advice = "the object has changed under the download; try again when its upload is over"
    elif isinstance(error, PermissionDeniedError | UnauthenticatedError) or "403 Forbid" in text:
        advice = "check the credentials and whether they may list and read there"
    elif isinstance(error, FileNotFoundError) or "404 Not Found" in text:
        advice = "check bucket, path and endpoint"
    else:
        advice = f"check {check or 'endpoint, region, credentials and the network'}"
    return DownloadError(f"{_safe(what)}: {text}; {advice}")


def _unsafe(uri: str, path: str) -> DownloadError:
    return DownloadError(
        f"{_safe(uri)} holds an object {path}, which would leave the folder it goes to; rename it"
    )


def _message(error: Exception) -> str:
    """Keep the store's own message, without obstore's dump, request ids and key ids around it."""
    text = describe(error).partition("\n\nDebug source")[0]
    said = [re.search(f"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message")]
    if any(said):
        text = text.partition("<")[0] + ": ".join(found[1] for found in said if found)
    return " ".join(_safe(text).split()).rstrip(".")


def _safe(text: str) -> str:
    """Take out of a text what may hold secrets: query strings, and passwords in URLs."""
    text = re.sub(r"(\w+://[^\s?]*)\?[^\s)>\"']*", r"\1", text)
    return re.sub(r"://[^/@\s]*:[^/@\s]*@", "://", text)
