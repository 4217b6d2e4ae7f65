"""Stores' errors as ours: without secrets, and with advice that helps."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from rayserve_hooks.core.masked_errors import masked
from rayserve_hooks.core.masking import redact
from rayserve_hooks.errors import DownloadError, HooksError, describe, raise_from

_CREDENTIALS = "check the credentials and whether they may list and read there"
_CLOCK = "set the clock of this node, or of the store"
_ENCRYPTION = "check that the object's key is enabled and that the credentials may decrypt with it"
_MISSING = "check bucket, path and endpoint"
_PATIENCE = "the store asks for fewer requests: start fewer nodes at once, or try again later"
_REGION = "check the region, and that the endpoint is that of the bucket"
CHANGED = "the object has changed under the download; try again when its upload is over"
_ARCHIVED = "the object is archived: restore it, or copy it to a storage class that can be read"
_CHANGES = ("PreconditionFailed", "InvalidRange", "ConditionNotMet", "412", "416")
_TLS = (
    "check the server's certificate, and that who signed it is among the system's, in "
    "SSL_CERT_FILE or, for S3, in AWS_CA_BUNDLE"
)
_ADVICE = {
    "InvalidObjectState": _ARCHIVED,
    "BlobArchived": _ARCHIVED,
    "BlobBeingRehydrated": "the object is being restored: try again when that is over",
    **dict.fromkeys(_CHANGES, CHANGED),
    "RequestTimeTooSkewed": _CLOCK,
    "RequestExpired": _CLOCK,
    "SignatureDoesNotMatch": (
        "check the secret key, and that no proxy changes the path, the query or the Host header"
    ),
    "InvalidAccessKeyId": "check that the access key exists in this store and is active",
    "InvalidTokenId": "check the session token",
    "InvalidToken": "check the session token: it belongs to another key, or is cut off",
    "ExpiredToken": "the session token has expired: get a new one, or let a role refresh it",
    "TokenRefreshRequired": "the session token has expired: get a new one",
    "NoSuchBucket": _MISSING,
    "ContainerNotFound": "check the container's and the account's name",
    "NoSuchKey": _MISSING,
    "BlobNotFound": _MISSING,
    **dict.fromkeys(("SlowDown", "Throttling", "TooManyRequests", "429"), _PATIENCE),
    **dict.fromkeys(("RequestLimitExceeded", "ServerBusy", "ServiceUnavailable"), _PATIENCE),
    **dict.fromkeys(("InternalError", "500", "502", "503", "504"), "try again later"),
    **dict.fromkeys(("PermanentRedirect", "AuthorizationHeaderMalformed"), _REGION),
    **dict.fromkeys(("IllegalLocationConstraintException", "301", "307"), _REGION),
    **dict.fromkeys(("KMS.", "kms:"), _ENCRYPTION),
    "RequesterPays": "the bucket's readers pay: this download does not; copy the model",
    "AllAccessDisabled": "the bucket's owner has to enable access again",
    "407": "the proxy wants a user and a password: write them into its URL",
    "Tunnel connection failed": "check the proxy, and whether it lets this host through",
    "the proxy ": "check the variables http_proxy, https_proxy and no_proxy",
    "InvalidCertificate": _TLS,
    "CERTIFICATE_VERIFY_FAILED": _TLS,
    "WRONG_VERSION_NUMBER": "the server does not speak TLS there: check the endpoint's scheme",
    "Name or service not known": "check the endpoint's host and the DNS of this node",
    "name resolution": "check the endpoint's host and the DNS of this node",
    "dns error": "check the endpoint's host and the DNS of this node",
    "NoCredentialsError": (
        "set AWS_ACCESS_KEY_ID or AWS_PROFILE, or write s3://anonymous@bucket for a public bucket"
    ),
    "ProfileNotFound": "correct AWS_PROFILE, or put the configuration file on every node",
    "InvalidRegionError": (
        "correct the region in AWS_DEFAULT_REGION, AWS_REGION or the configuration file"
    ),
    "ConfigParseError": "correct that file, or unset the variable that names it",
    "Invalid endpoint": (
        "write the endpoint in AWS_ENDPOINT_URL or the configuration file with its scheme, as in "
        "'http://host:9000'"
    ),
    "PaginationError": "check the endpoint and the proxies: a store ends its listings",
    "invalid path": (
        "rename the object: this store's client reads no names with an empty part, '.' or '..'"
    ),
    "panicked": "a library gave up on these settings: check endpoint, region and credentials",
    "AccessDenied": _CREDENTIALS,
    **dict.fromkeys(("401", "403", "AuthorizationFailure", "AuthenticationFailed"), _CREDENTIALS),
    **dict.fromkeys(("AuthorizationPermissionMismatch", "Unauthenticated"), _CREDENTIALS),
    **dict.fromkeys(("PermissionDenied", "Unauthorized", "Forbidden"), _CREDENTIALS),
    "404": _MISSING,
}
"""By what an error's text has, the first one that it has; a number only as a status of HTTP."""

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


class NativeError(Exception):
    """A native library panicked, which is no ``Exception`` as the library raises it."""


@contextlib.contextmanager
def native() -> Iterator[None]:
    """Raise a panic of a native library in the block as an ordinary error."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # each library in Rust has its own class
            raise
        raise NativeError(f"a native library panicked: {error}") from error


@contextlib.contextmanager
def border(*values: object) -> Iterator[None]:
    """Raise what ends a download as its caller may show it: the last resort, at its border.

    A panic is the download's failure, and neither an error nor what it came from shows a secret;
    known ones are among ``values``, too.
    """
    try:
        with native():
            yield
    except NativeError as error:
        raise_from(failure("the download ended", error), masked(error, *values))
    except HooksError as error:  # whose own text is without
        raise_from(error, error.__cause__ and masked(error.__cause__, *values))
    except Exception as error:
        clean = masked(error, *values)
        if clean is error:
            raise
        raise_from(clean, clean.__cause__)


def failure(what: str, error: Exception, check: str | None = None) -> DownloadError:
    """Return a store's error as ours: its own message, and what to check if it does not say.

    Args:
        what: What could not be done; it may be logged as it is.
        error: Whatever the store's client raised.
        check: What to check where the message tells nothing.
    """
    if isinstance(error, DownloadError):
        return error
    text = message_of(error)
    return DownloadError(f"{what}: {text}; {_advice(f'{type(error).__name__} {text}', check)}")


def _advice(text: str, check: str | None) -> str:
    for sign, advice in _ADVICE.items():
        if re.search(rf"\b{sign} [A-Z]" if sign.isdigit() else re.escape(sign), text):
            return advice
    if ("NotFound" in text and "[Errno" not in text) or "Not Found" in text:  # of a store
        return _MISSING
    if "Precondition" in text:
        return CHANGED
    return f"check {check or 'endpoint, region, credentials and the network'}"


def message_of(error: BaseException) -> str:
    """Return the store's own message, without obstore's dump, request ids and key ids."""
    response = getattr(error, "response", None)
    if isinstance(response, dict) and "Error" in response:  # botocore's ClientError
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", "")
        said = response["Error"]
        text = f"{status} {said.get('Code', '')}: {said.get('Message', '')}"
        return _one_line(text.replace(f"{status} {status}", f"{status}"))
    if type(error).__module__.startswith("botocore.") and error.__cause__ is not None:
        return message_of(error.__cause__)
    text, _, dump = describe(error).partition("\n\nDebug source")
    if type(error).__module__.startswith("rayserve_hooks."):
        text = str(error)
    matches = [re.search(f"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message")]
    if any(matches):
        text = text.partition("<")[0] + ": ".join(match[1] for match in matches if match)
    elif "HTTP error" in text and (reason := _REASON.search(dump)):
        # The store sent no response, and only the dump has the reason.
        text = ": ".join(filter(None, [text, *reason.groups()]))
    return _one_line(text)


def _one_line(text: str) -> str:
    return redact(" ".join(_short_urls(text).split()).rstrip("."))


def _short_urls(text: str) -> str:
    """Return a text whose URLs have neither query nor user: requests are long and all alike."""
    text = re.sub(r"(\w+://[^\s?]*?)(\?|%3[Ff])[^\s)>\"']*", r"\1", text)
    return re.sub(r"://[^/@\s]*:[^/@\s]*@", "://", text)


def shown(uri: str) -> str:
    """Return a URI as it may be logged: without user, password and what its query says."""
    scheme, separator, rest = uri.partition("://")
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    # A container of Azure's is before it, too.
    if at and user != "anonymous" and scheme not in ("azure", "abfss"):
        return redact(f"{scheme}{separator}***@{host}{slash}{path}")
    return redact(uri)
