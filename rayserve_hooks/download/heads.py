"""HEAD requests for what no listing holds: the checksum of an object.

S3 has one if the upload asked for it, of the full object or of its parts' checksums; the latter is
of no use here. Google Cloud Storage has a CRC32C of every object. Azure has an MD5 if the client
that uploaded the object sent one.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rayserve_hooks.download.checksums import new_hash
from rayserve_hooks.download.stores import RemoteFile, Source, aws_region, message_of

if TYPE_CHECKING:
    import urllib.request

_TIMEOUT_S = 30
_SCHEMES = ("s3", "gs", "azure", "abfss")
# Computing an MD5 takes longer than the download, so a faster checksum is requested of large files.
_ABOVE_BYTES = 64 * 2**20
_MD5_ETAG = re.compile(r'"?([0-9a-f]{32})"?')


@dataclass(frozen=True)
class Head:
    """What the store knows of an object's content.

    Args:
        checksum: Of the full object, as ``"<algorithm>:<value>"``; None if there is none.
        etag_is_md5: False for objects encrypted with a key, whose ETag is no hash of the content.
    """

    checksum: str | None
    etag_is_md5: bool


def expected_checksum(file: RemoteFile, head: Head | None) -> str | None:
    """Return the checksum that the store has of an object, if any, as ``"<algorithm>:<value>"``."""
    if head is not None and head.checksum is not None:
        return head.checksum
    found = _MD5_ETAG.fullmatch(file.etag or "")
    if found is None or (head is not None and not head.etag_is_md5):
        return None
    return f"md5:{found[1]}"


class Heads:
    """Requests the checksums of one store's objects.

    Args:
        source: The store.
    """

    def __init__(self, source: Source) -> None:
        self.source, self._logger = source, source.caller.logger
        self._usable = source.scheme in _SCHEMES
        self._etags_are_md5 = True  # until a response shows otherwise

    def wanted(self, file: RemoteFile) -> bool:
        """Return whether the listing has no checksum of an object, or only a slow one."""
        has_md5 = self._etags_are_md5 and _MD5_ETAG.fullmatch(file.etag or "") is not None
        return self._usable and (file.size > _ABOVE_BYTES or not has_md5)

    def of(self, file: RemoteFile) -> Head | None:
        """Return an object's head; None if the store refuses, has none, or boto3 is missing."""
        import urllib.request  # costs more than the rest of this module

        request = self._request(file.path) if self._usable else None
        if request is None:
            return None
        try:
            tls = self.source.tls if request.type == "https" else None
            # The endpoint is the operator's own setting, and https by default.
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=tls) as response:  # noqa: S310
                headers = response.headers
        except Exception as error:  # not worth a failed download, whatever it is
            uri, why = self.source.shown_uri, message_of(error)
            self._logger.warning("no checksum for %s of %s: %s", file.path, uri, why)
            return None
        etags = {str(etag).strip('"') for etag in (headers.get("ETag", file.etag), file.etag)}
        if len(etags) > 1:  # only some listings have the quotes
            return None  # another version; the ranges, which are pinned to ours, will fail
        encrypted = headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
        own_key = "x-amz-server-side-encryption-customer-algorithm" in headers
        etag_is_md5 = self.source.scheme == "s3" and not (encrypted or own_key)
        self._etags_are_md5 &= etag_is_md5
        return Head(_full_checksum(headers), etag_is_md5)

    def _request(self, path: str) -> urllib.request.Request | None:
        """Build the request, with the credentials that the downloads use."""
        import urllib.request

        try:
            url, headers = self._s3(path) if self.source.scheme == "s3" else self._others(path)
        except Exception as error:  # whatever botocore or obstore raise; it will be so for all
            self._usable = False
            missing = isinstance(error, ImportError)
            self._logger.warning(
                "%s: some files are verified by size only, because the store cannot be asked for "
                "their checksum: %s%s",
                self.source.shown_uri,
                message_of(error),
                "; install 'rayserve_hooks[download]' on every node" if missing else "",
            )
            return None
        return urllib.request.Request(url, method="HEAD", headers=headers)  # noqa: S310 - as above

    def _s3(self, path: str) -> tuple[str, dict[str, str]]:
        """Sign as botocore does; obstore's signed URLs cannot request a checksum.

        Not with a client of boto3: creating one holds the GIL for 100 ms, for one kind of request.
        """
        session = None if self.source.anonymous else self._session
        region = aws_region() or (session and session.region_name) or "us-east-1"
        url = self.source.url_of(path, region)
        headers = {"x-amz-checksum-mode": "ENABLED"}
        if session is not None:
            from botocore.auth import S3SigV4Auth
            from botocore.awsrequest import AWSRequest

            signed = AWSRequest("HEAD", url, headers=headers)
            S3SigV4Auth(session.get_credentials(), "s3", region).add_auth(signed)
            headers = dict(signed.headers.items())
        return url, headers

    @functools.cached_property
    def _session(self) -> Any:
        import boto3

        return boto3.Session()

    def _others(self, path: str) -> tuple[str, dict[str, str]]:
        # Azure signs permissions instead of methods; reading is the permission of GET.
        method: Literal["GET", "HEAD"] = "HEAD" if self.source.scheme == "gs" else "GET"
        return self.source.readable_url_of(path, method), {}


def _full_checksum(headers: Mapping[str, str]) -> str | None:
    """Return the fastest checksum of the whole object that can be computed here."""
    for algorithm in ("crc64nvme", "crc32c", "crc32", "sha256", "sha1"):
        value = headers.get(f"x-amz-checksum-{algorithm}")
        # A checksum of checksums ends in the number of parts; some stores do not send the type.
        kind = headers.get("x-amz-checksum-type", "FULL_OBJECT")
        full = kind == "FULL_OBJECT" and "-" not in str(value)
        if value and full and new_hash(algorithm) is not None:
            return f"{algorithm}:{value}"
    google = dict(re.findall(r"(crc32c|md5)=([\w+/]+=*)", headers.get("x-goog-hash", "")))
    if "crc32c" in google and new_hash("crc32c") is not None:
        return f"crc32c:{google['crc32c']}"
    md5 = google.get("md5") or headers.get("Content-MD5")
    return f"md5:{base64.b64decode(md5).hex()}" if md5 else None
