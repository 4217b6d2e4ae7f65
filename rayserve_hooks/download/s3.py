"""S3: botocore decides, and what it has signed is read by our own client.

Endpoint, addressing, region, credentials, signature, retries and parsing are those of one client
of botocore, as boto3 would make it of the same settings. It hands over each request as it is about
to send it (its public event ``before-send``), so that its own and those for bytes go through one
pool, with one idea of certificates and proxies.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rayserve_hooks.download import settings
from rayserve_hooks.download.caller import STANDALONE, Caller
from rayserve_hooks.download.reader import (
    BREAKS,
    AnswerError,
    Parts,
    Pool,
    Span,
    parts_of,
    refused,
    resumed,
)
from rayserve_hooks.download.store_errors import CHANGED, message_of, native
from rayserve_hooks.download.stores import ANONYMOUS, RemoteFile, Source
from rayserve_hooks.errors import DownloadError

if TYPE_CHECKING:
    import ssl
    from email.message import Message

    from obstore.store import S3Store

# Up to here obstore reads whole objects, in which many requests per second count most.
_SMALL_BYTES = 2**18
# Keys that every library writes alike into a URL; others are left to our own reader.
_PLAIN_KEY = re.compile(r"[\w.,=@+ -]+(/[\w.,=@+ -]+)*", re.ASCII)
_BUCKET = r"[\w.-]{1,255}"  # what botocore takes
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_CLIENTS = 8
_clients: dict[tuple[object, ...], Client] = {}
_making = threading.Lock()


class _Body:
    """An answer's body as botocore takes it."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def stream(self) -> Iterator[bytes]:
        yield self._data


class Client:
    """A client of botocore whose requests are sent by our own pool, in any thread."""

    def __init__(self, anonymous: bool) -> None:
        import botocore.session
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.parsers import ResponseParserFactory

        from rayserve_hooks.download.botocore_data import data_loader

        with settings.without_empty_variables():
            session = botocore.session.Session()
            _drop_empty(session.get_scoped_config())
            data = data_loader(session.get_config_variable("data_path"))
            session.register_component("data_loader", data)
            self._bundle = session.get_config_variable("ca_bundle")
            self._bundle_from = "AWS_CA_BUNDLE" if os.environ.get("AWS_CA_BUNDLE") else "ca_bundle"
            if not self._bundle:
                self._bundle_from = "REQUESTS_CA_BUNDLE"
                self._bundle = os.environ.get("REQUESTS_CA_BUNDLE")
            self.credentials = None if anonymous else session.get_credentials()
            if not anonymous:
                self._check_credentials()
            # boto3 reads the one variable only, the other SDKs the other.
            region = session.get_config_variable("region") or os.environ.get("AWS_REGION")
            # Times are only compared here, and reading them takes nine tenths of a listing's time.
            # The session's own parser stays: it may read when credentials expire.
            parsers = ResponseParserFactory()
            parsers.set_parser_defaults(timestamp_parser=str)
            session.register_component("response_parser_factory", parsers)
            self.s3 = session.create_client(
                "s3",
                region_name=region,
                config=Config(signature_version=UNSIGNED) if anonymous else None,
            )
            session.register_component("response_parser_factory", ResponseParserFactory())
        settings.check_endpoint("the endpoint", self.s3.meta.endpoint_url)
        self.s3.meta.events.register("before-send.s3", self._send)
        self.pool = Pool(self._tls, settings.proxy_of_boto3)
        self._local = threading.local()

    def _check_credentials(self) -> None:
        if self.credentials is None:
            raise DownloadError(
                "boto3 finds no AWS credentials; set AWS_ACCESS_KEY_ID or AWS_PROFILE, or write "
                "s3://anonymous@bucket for a public bucket"
            )
        frozen = self.credentials.get_frozen_credentials()
        settings.check_credentials(
            f"boto3's {self.credentials.method!r}",
            frozen.access_key,
            frozen.secret_key,
            frozen.token,
        )

    def _tls(self) -> ssl.SSLContext:
        return self._context

    @functools.cached_property
    def _context(self) -> ssl.SSLContext:
        return settings.tls_context(self.certificates(), self._bundle_from)

    def certificates(self) -> str | None:
        """Return the certificates to trust besides the system's."""
        return settings.certificates(self._bundle, self._bundle_from)

    @contextlib.contextmanager
    def asking(self, stopped: threading.Event) -> Iterator[None]:
        """Let this thread's requests in the block end with the download, and after a time."""
        self._local.stopped = stopped
        self._local.until = time.monotonic() + 3 * settings.stall_s()
        try:
            yield
        finally:
            del self._local.stopped

    def signed(self, **parameters: str) -> tuple[str, dict[str, str]]:
        """Return URL and headers of a GET of an object, as boto3 would send them."""
        taken: list[Any] = []
        self._local.taken = taken
        try:
            self.s3.get_object(**parameters)
        finally:
            del self._local.taken
        headers = {
            name: value.decode("latin-1") if isinstance(value, bytes) else str(value)
            for name, value in taken[0].headers.items()
        }
        return taken[0].url, headers

    def _send(self, request: Any, **_: object) -> Any:
        from botocore.awsrequest import AWSResponse
        from botocore.exceptions import ConnectionError as Unreachable

        if (taken := getattr(self._local, "taken", None)) is not None:
            taken.append(request)
            return AWSResponse(request.url, 200, {}, _Body(b""))
        if (stopped := getattr(self._local, "stopped", None)) is None:
            return None
        headers = {
            name: value.decode("latin-1") if isinstance(value, bytes) else str(value)
            for name, value in request.headers.items()
        }
        try:
            status, found, body = self.pool.text(request.method, request.url, headers, stopped)
        except AnswerError as error:
            if error.tries == 1 or time.monotonic() > self._local.until:
                raise
            raise Unreachable(error=error) from error  # of a kind that botocore repeats
        return AWSResponse(request.url, status, dict(found.items()), _Body(body))


def _drop_empty(section: dict[str, Any]) -> None:
    """Remove what a configuration file sets to nothing: as with variables, it is unset."""
    for name in [name for name, value in section.items() if value in ("", {})]:
        del section[name]
    for value in section.values():
        if isinstance(value, dict):
            _drop_empty(value)


def client_of(anonymous: bool) -> Client:
    """Return the process's client for the settings as they are now; the first takes 0.05 s."""
    key = (anonymous, os.getpid(), *settings.identity())
    with _making:
        if key not in _clients:
            if len(_clients) >= _MOST_CLIENTS:
                for client in _clients.values():
                    client.pool.close()
                _clients.clear()
            _clients[key] = Client(anonymous)
        return _clients[key]


class S3Source(Source):
    """A folder of S3, or of a store that speaks like it."""

    def __init__(self, uri: str, caller: Caller = STANDALONE) -> None:
        super().__init__(uri, caller)
        rest = uri.partition("://")[2].removeprefix(ANONYMOUS)
        self.bucket, _, prefix = rest.partition("/")
        if not self.bucket.startswith("arn:") and not re.fullmatch(_BUCKET, self.bucket):
            raise DownloadError(f"{self.shown_uri} names no bucket; write s3://bucket/path")
        self.prefix = f"{prefix}/" if prefix and not prefix.endswith("/") else prefix
        self.client = client_of(self.anonymous)
        self._validators: dict[tuple[str, str], str] = {}
        self._plain = True
        self._worked = False

    def _pages(self) -> Iterator[list[RemoteFile]]:
        pages = self.client.s3.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self.prefix
        )
        pending = iter(pages)
        while True:
            with self.client.asking(self.stopped):
                page = next(pending, None)
            if page is None:
                return
            yield [self._remote(found) for found in page.get("Contents", ())]

    def _object(self, name: str) -> Iterator[RemoteFile]:
        key = self.prefix + name
        with self.client.asking(self.stopped):
            page = self.client.s3.list_objects_v2(Bucket=self.bucket, Prefix=key, MaxKeys=1)
        # Keys are listed in order, so that of all that begin so the shortest comes first.
        yield from (
            self._remote(found) for found in page.get("Contents", ()) if found["Key"] == key
        )

    def _remote(self, found: Mapping[str, Any]) -> RemoteFile:
        etag = known(found.get("ETag"))
        if not found["Key"].startswith(self.prefix):
            raise DownloadError(
                f"{self.shown_uri} was listed, and the store answers with {found['Key']!r}, which "
                "is not below it; check the endpoint and the proxies"
            )
        path = found["Key"][len(self.prefix) :]
        version = etag or str(found["LastModified"])
        return RemoteFile(path, int(found["Size"]), etag, version)

    def head(self, file: RemoteFile) -> Mapping[str, str]:
        with self.client.asking(self.stopped):
            found = self.client.s3.head_object(
                Bucket=self.bucket, Key=self.prefix + file.path, ChecksumMode="ENABLED"
            )
        headers: Mapping[str, str] = found["ResponseMetadata"]["HTTPHeaders"]
        return headers

    def parts(self, file: RemoteFile, span: Span) -> Parts:
        if span == (0, file.size) and 0 < file.size <= _SMALL_BYTES:
            data = self._read_small(file)
            if data is not None:
                yield data
                return
        what = f"cannot fetch {file.path!r} of {self.shown_uri}"
        body = functools.partial(self._body, file)
        with contextlib.closing(resumed(what, span, body, self.stopped)) as parts:
            yield from parts

    def close(self) -> None:
        super().close()
        self.client.pool.close()

    def _body(self, file: RemoteFile, span: Span) -> Iterator[memoryview]:
        start, end = span
        parameters = {"Bucket": self.bucket, "Key": self.prefix + file.path}
        if span != (0, file.size):
            parameters["Range"] = f"bytes={start}-{end - 1}"
        if file.etag is not None:
            parameters["IfMatch"] = file.etag
        try:
            url, headers = self.client.signed(**parameters)
        except Exception as error:  # of the credentials, mostly: they may have to be renewed
            raise AnswerError(message_of(error), tries=BREAKS) from error
        pool = self.client.pool
        with pool.exchange("GET", url, headers, self.stopped) as (response, buffer):
            if response.status in _REDIRECTS:
                raise self._redirected(file, url, response)
            if response.status not in (200, 206):
                problem = refused(response)
                if problem.code == "AuthorizationHeaderMalformed":
                    problem = self._redirected(file, url, response, problem)
                raise problem
            self._check(file, span, response.status, response.headers)
            yield from parts_of(response, buffer, end - start)

    def _redirected(
        self, file: RemoteFile, url: str, response: Any, error: AnswerError | None = None
    ) -> AnswerError:
        """Let botocore find the bucket's region; return the error for the next time."""
        with contextlib.suppress(Exception):  # what is wrong is seen in the next answer
            self.head(file)
        if error is not None:
            return AnswerError(str(error), status=error.status, code=error.code, tries=2)
        try:
            host = urlsplit(response.headers.get("Location", "")).hostname
        except ValueError:
            host = None
        text = (
            f"PermanentRedirect: {urlsplit(url).hostname!r} redirects to {host!r}, where no "
            "credentials are sent"
        )
        return AnswerError(text, status=response.status, tries=2)

    def _check(self, file: RemoteFile, span: Span, status: int, headers: Message) -> None:
        """Raise if an answer is not the one range of the one version that was asked for."""
        start, end = span
        length, sent = headers.get("Content-Length", "").strip(), headers.get("Content-Range")
        whole = span == (0, file.size)
        if status == 206 and sent is not None:
            found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", sent.strip())
            if found is None or (int(found[1]), int(found[2]) + 1) != span:
                raise AnswerError(f"asked for bytes {start} to {end - 1}, the answer has {sent!r}")
            if found[3] not in ("*", str(file.size)):
                raise DownloadError(
                    f"cannot fetch {file.path!r} of {self.shown_uri}: it has {found[3]} bytes, but "
                    f"{file.size} in the listing; {CHANGED}"
                )
        elif not whole:
            raise AnswerError(
                f"asked for bytes {start} to {end - 1}, the answer has all: the store or a proxy "
                "does not know ranges"
            )
        encoding = headers.get("Content-Encoding", "identity").strip().lower()
        # An object may have been stored as encoded; then its own bytes are sent, with their length.
        encoded = encoding not in ("", "identity", "aws-chunked") and length != str(end - start)
        # One that is no number says nothing; the client reads to the end then.
        if encoded or (length.isdecimal() and int(length) > end - start):
            detail = f"in the encoding {encoding!r}" if encoded else f"with {length} bytes"
            raise DownloadError(
                f"cannot fetch {file.path!r} of {self.shown_uri}: {end - start} bytes are sent "
                f"{detail}; the store or a proxy changes it: let it send what is stored"
            )
        self._check_version(file, headers)

    def _check_version(self, file: RemoteFile, headers: Message) -> None:
        etag = known(headers.get("ETag"))
        found = etag or headers.get("Last-Modified")
        if found is None:
            return  # some gateways send neither
        first = file.etag if etag and file.etag else None
        first = first or self._validators.setdefault((file.path, file.version), found)
        if bare(first) != bare(found):
            raise DownloadError(
                f"cannot fetch {file.path!r} of {self.shown_uri}: the version is {found!r}, but "
                f"{first!r} was listed or sent before; {CHANGED}"
            )

    def _read_small(self, file: RemoteFile) -> memoryview | None:
        """Return a small object by obstore; None wherever our own reader has to decide."""
        key = self.prefix + file.path
        if not self._plain or _PLAIN_KEY.fullmatch(key) is None:
            return None
        if {"", ".", ".."} & set(key.split("/")):
            return None
        store = self._fast
        if store is None:
            return None
        import obstore

        try:
            options: Any = {} if file.etag is None else {"if_match": file.etag}
            with native():
                result = obstore.get(store, key, options=options)
                meta = result.meta
                same = file.etag is None or bare(meta["e_tag"] or "") == bare(file.etag)
                encoded = "Content-Encoding" in result.attributes
                if same and not encoded and meta["size"] == file.size:
                    data = memoryview(result.bytes())
                    if len(data) == file.size:
                        self._worked = True
                        return data
            why = "another version or length"
        except Exception as error:  # whatever it is, it is found out by our own reader
            why = message_of(error)
        # Once it has worked, a failure concerns one object alone.
        self._plain = self._worked
        text = "%s: %s is not read by obstore: %s"
        self.caller.logger.debug(text, self.shown_uri, file.path, why)
        return None

    @property
    def store(self) -> S3Store | None:
        """Obstore's client of the bucket; None where only botocore can be used."""
        return self._fast

    @functools.cached_property
    def _fast(self) -> S3Store | None:
        """A store of obstore that is told what botocore has decided; None if it cannot do that."""
        try:
            from obstore.store import S3Store

            url, headers = self.client.signed(Bucket=self.bucket, Key="x")
        except Exception as error:  # it is only faster
            self.caller.logger.debug("%s: obstore is not used: %s", self.shown_uri, error)
            return None
        host = urlsplit(url)
        scope = re.match(
            r"AWS4-HMAC-SHA256 Credential=[^,]*/\d{8}/([\w-]+)/s3/aws4_request",
            headers.get("Authorization", ""),
        )
        if (scope is None) != self.anonymous or settings.proxy_of_boto3(url) is not None:
            return None
        names = {name.lower() for name in headers}
        aws = (host.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
        # It follows redirects, and takes a session's token along.
        if "x-amz-s3session-token" in names or ("x-amz-security-token" in names and not aws):
            return None
        limit = f"{min(settings.stall_s(), 10.0)}s"
        client: dict[str, Any] = {
            "allow_http": host.scheme == "http",
            "connect_timeout": "5s",
            "read_timeout": limit,
            "timeout": f"{settings.stall_s()}s",
            **settings.proxy_options(None, only=host.hostname),
        }
        if host.scheme == "https" and (extra := self.client.certificates()) is not None:
            client["root_certificate"] = extra
        options: dict[str, Any] = {
            # Of the names it has for this, the one that counts most, so that no variable does.
            "aws_endpoint_url_s3": url.removesuffix("/x"),
            "virtual_hosted_style_request": True,
            "s3_express": False,
            "request_payer": False,
            "skip_signature": self.anonymous,
            "client_options": client,
            "retry_config": {"max_retries": 0},
        }
        if self.anonymous:
            options["region"] = "us-east-1"
        else:
            options |= {"credential_provider": self._credentials, "region": scope and scope[1]}
        try:
            with native(), settings.without_empty_variables():
                return S3Store(self.bucket, **options)
        except Exception as error:  # as above
            self.caller.logger.debug("%s: obstore is not used: %s", self.shown_uri, error)
            return None

    def _credentials(self) -> Any:
        """Return botocore's credentials as obstore takes them, for a minute: they may change."""
        credentials: Any = self.client.credentials
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token or None,
            "expires_at": dt.datetime.now(dt.UTC) + dt.timedelta(minutes=1),
        }


def known(etag: str | None) -> str | None:
    """Return an ETag; None for one without content, which some gateways give to every object."""
    return etag if etag and bare(etag) else None


def bare(etag: str) -> str:
    """Return an ETag without what only some answers have."""
    return etag.removeprefix("W/").strip('"')
