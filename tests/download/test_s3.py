"""S3 as boto3's settings have it: what works with stock must work here, unchanged."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import logging
import os
import random
import re
import socket
import socketserver
import ssl
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import moto_server
import pytest
import s3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.download import s3 as s3_source
from rayserve_hooks.download.model import Mirror, download_node
from rayserve_hooks.download.stores import open_source
from rayserve_hooks.errors import DownloadError

pytestmark = pytest.mark.usefixtures("clean")

CONTENT = random.Random(0).randbytes(300_000)
ALL = NodeModelDownloadable.MODEL_AND_TOKENIZER
NAMES = ("config.json", "weights")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "buckets" / "bucket" / "model"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(CONTENT)
    (folder / "config.json").write_text("{}")
    return tmp_path / "buckets"


@pytest.fixture
def server(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Server]:
    with s3.serving(root) as running:
        running.etags, running.crc64 = "multipart", True
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


def download(uri: str = "s3://bucket/model") -> bytes:
    path = download_node("org/tiny", Mirror(uri), ALL)
    assert path is not None
    assert sorted(file.name for file in Path(path).iterdir()) == sorted(NAMES)
    return Path(path, "weights").read_bytes()


def config(text: str) -> None:
    Path(os.environ["AWS_CONFIG_FILE"]).write_text(text)


def virtual_hosts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Resolve each host below localhost, as only some systems do; return who was looked for."""
    looked_for: list[str] = []
    resolve = socket.getaddrinfo

    def resolve_localhost(host: Any, *arguments: Any, **options: Any) -> Any:
        looked_for.append(str(host))
        known = "127.0.0.1" if str(host).endswith(".localhost") else host
        return resolve(known, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_localhost)
    return looked_for


class TestConfigurationFile:
    @pytest.mark.parametrize(
        "text",
        [
            "[default]\nendpoint_url = {url}\nregion = eu-one-1\n",
            "[default]\nservices = mine\n[services mine]\ns3 =\n  endpoint_url = {url}\n",
        ],
    )
    def test_the_endpoint(
        self, text: str, server: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        config(text.format(url=server.url))
        assert download() == CONTENT
        region = "eu-one-1" if "eu-one" in text else "us-east-1"
        signed = {headers["authorization"].split("/")[2] for headers in server.headers}
        assert signed == {region}
        # The listing, both files and their checksums.
        assert len(server.headers) == 5

    def test_a_profile(self, server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_PROFILE", "other")
        config(f"[profile other]\nendpoint_url = {server.url}\nregion = eu-three-1\n")
        Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).write_text(
            "[other]\naws_access_key_id = fromfile\naws_secret_access_key = s\n"
        )
        assert download() == CONTENT
        signed = {headers["authorization"].split(",")[0] for headers in server.headers}
        (scope,) = signed
        assert re.fullmatch(
            r"AWS4-HMAC-SHA256 Credential=fromfile/\d+/eu-three-1/s3/aws4_request", scope
        )

    @pytest.mark.parametrize("scheme", ["s3://", "s3://anonymous@"])
    def test_virtual_hosted_addresses(
        self, scheme: str, server: s3.Server, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config("[default]\ns3 =\n  addressing_style = virtual\n")
        port = server.url.rpartition(":")[2]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://store.localhost:{port}")
        server.virtual = True
        looked_for = virtual_hosts(monkeypatch)
        assert download(f"{scheme}bucket/model") == CONTENT
        hosts = {headers["host"] for headers in server.headers}
        assert hosts == {f"bucket.store.localhost:{port}"}
        assert set(looked_for) == {"bucket.store.localhost"}
        assert server.count("HEAD") == 2

    def test_retries(self, server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> None:
        config("[default]\nretry_mode = standard\nmax_attempts = 1\n")
        server.faults = [s3.Fault("busy", path="bucket")]
        text = (
            "cannot list s3://bucket/model: 503 SlowDown: Please reduce your request rate; the "
            "store asks for fewer requests: start fewer nodes at once, or try again later"
        )
        with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
            download()
        assert server.count("LIST") == 1


class TestRegion:
    @pytest.mark.parametrize("configured", [None, "us-west-2"])
    def test_a_bucket_in_another_region(
        self, configured: str | None, server: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if configured:
            monkeypatch.setenv("AWS_DEFAULT_REGION", configured)
        server.region = "eu-west-3"
        assert download() == CONTENT
        assert server.count("LIST") == 2
        assert len(server.headers) == 6
        # It is remembered, also by the next download of the process.
        server.headers.clear()
        assert open_source("s3://bucket/model").list_files()
        assert len(server.headers) == 1

    def test_one_that_changes_meanwhile(self, server: s3.Server) -> None:
        with contextlib.closing(open_source("s3://bucket/model")) as source:
            weights = source.list_files()["weights"]
            server.region = "eu-west-4"
            with contextlib.closing(source.parts(weights, (0, 300_000))) as parts:
                assert b"".join(map(bytes, parts)) == CONTENT

    def test_the_variable_of_other_sdks_is_the_last(
        self, server: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_REGION", "eu-one-1")
        assert open_source("s3://bucket/model").list_files()
        monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-two-2")
        assert open_source("s3://bucket/model").list_files()
        signed = [headers["authorization"].split("/")[2] for headers in server.headers]
        assert signed == ["eu-one-1", "eu-two-2"]


EMPTY = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_SESSION_TOKEN",
    "AWS_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "AWS_MAX_ATTEMPTS",
    "AWS_RETRY_MODE",
    "AWS_DEFAULTS_MODE",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_SKIP_SIGNATURE",
    "http_proxy",
    "RAYSERVE_HOOKS_STALL_S",
)


class TestVariables:
    def test_empty_ones_are_unset(self, server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in EMPTY:
            monkeypatch.setenv(name, "")
        assert download() == CONTENT
        assert all(os.environ[name] == "" for name in EMPTY)

    @pytest.mark.parametrize("name", EMPTY)
    def test_an_empty_one_is_unset(
        self, name: str, server: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(name, "")
        assert sorted(open_source("s3://bucket/model").list_files()) == list(NAMES)

    def test_an_empty_endpoint_is_that_of_the_file(
        self, server: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "")
        config(f"[default]\nendpoint_url = {server.url}\n")
        assert download() == CONTENT

    @pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
    @pytest.mark.parametrize(
        "value", ["host:9000", "host", "localhost:9000", "ftp://host", "http://", "http://h:port"]
    )
    def test_an_endpoint_that_is_no_url(
        self, name: str, value: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(name, value)
        text = (
            f"{name} is {value!r}, which is no URL; write it with its scheme, as in "
            "'http://host:9000'"
        )
        with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
            open_source("s3://bucket/model")

    def test_an_endpoint_of_the_file_that_is_no_url(self) -> None:
        config("[default]\nendpoint_url = host:9000\n")
        text = (
            "cannot open s3://bucket/model: ValueError: Invalid endpoint: host:9000; write the "
            "endpoint in AWS_ENDPOINT_URL or the configuration file with its scheme, as in "
            "'http://host:9000'"
        )
        with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
            open_source("s3://bucket/model")

    @pytest.mark.parametrize(
        "name",
        [
            "AWS_ENDPOINT_URL",
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "AWS_REGION",
            "AWS_DEFAULT_REGION",
            "AWS_PROFILE",
        ],
    )
    @pytest.mark.parametrize("char", ["\n", "\r\n", "\t", "\x7f"])
    def test_a_control_character(
        self, name: str, char: str, server: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(name, f"http://S3CRET{char}")
        text = (
            f"{name} holds a line break or another control character; write it without, also at "
            "its end"
        )
        with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
            open_source("s3://bucket/model")

    def test_credentials_that_no_header_can_have(
        self, server: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "schlüssel")
        text = (
            "the credentials from boto3's 'env' hold a control character or one outside of ASCII; "
            "write them without"
        )
        with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
            open_source("s3://bucket/model")

    @pytest.mark.parametrize("text", ["soon", "-1", "0", "inf", "nan"])
    def test_a_limit_that_is_no_time(self, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAYSERVE_HOOKS_STALL_S", text)
        wanted = f"RAYSERVE_HOOKS_STALL_S is {text!r}; write a number of seconds, as in '30'"
        with pytest.raises(DownloadError, match=f"^{re.escape(wanted)}$"):
            open_source("s3://bucket/model")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("AWS_MAX_ATTEMPTS", "many"),
            ("AWS_RETRY_MODE", "often"),
            ("AWS_DEFAULTS_MODE", "fast"),
            ("AWS_REQUEST_CHECKSUM_CALCULATION", "never"),
            ("AWS_STS_REGIONAL_ENDPOINTS", "some"),
            ("AWS_METADATA_SERVICE_TIMEOUT", "1s"),
        ],
    )
    def test_a_value_that_botocore_refuses(
        self, name: str, value: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(name, value)
        pattern = rf"{value}.*; check {name}, or the same in the configuration file$"
        with pytest.raises(DownloadError, match=pattern):
            open_source("s3://bucket/model")

    @pytest.mark.parametrize(
        ("text", "advice"),
        [
            ("[default\n", "correct that file, or unset the variable that names it"),
            ("[default]\nretry_mode = often\n", "check the URI, the credentials and the AWS"),
            ("[default]\ns3 = x\n", "check the URI, the credentials and the AWS configuration"),
            ("[default]\ncredential_process = /no/such\n", "check the URI, the credentials and"),
        ],
    )
    def test_a_file_that_botocore_refuses(
        self, text: str, advice: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config(text)
        if "process" in text:
            monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        with pytest.raises(DownloadError, match=rf"^cannot open .*; {advice}"):
            open_source("s3://bucket/model")

    def test_what_the_file_sets_to_nothing_is_unset(self, server: s3.Server) -> None:
        names = ("region", "endpoint_url", "ca_bundle", "retry_mode", "max_attempts")
        lines = [f"{name} =" for name in (*names, "request_checksum_calculation")]
        config("\n".join(["[default]", *lines, "s3 =", "  addressing_style =", ""]))
        assert download() == CONTENT

    @pytest.mark.parametrize("proxy", ["socks5://h:1", "http://", "http://user:SECRET@h:port"])
    def test_a_proxy_that_is_none(
        self, proxy: str, server: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("http_proxy", proxy)
        with pytest.raises(
            DownloadError, match=r"http_proxy is '(socks5|http):.*write it as in"
        ) as caught:
            open_source("s3://bucket/model").list_files()
        assert "SECRET" not in str(caught.value)

    def test_a_region_that_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_DEFAULT_REGION", "eu west")
        with pytest.raises(DownloadError, match=r"InvalidRegionError.*; correct the region in"):
            open_source("s3://bucket/model")


class TestCredentials:
    def test_none_at_all(self, server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        text = (
            "boto3 finds no AWS credentials; set AWS_ACCESS_KEY_ID or AWS_PROFILE, or write "
            "s3://anonymous@bucket for a public bucket"
        )
        with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
            open_source("s3://bucket/model")
        assert download("s3://anonymous@bucket/model") == CONTENT
        assert all("authorization" not in headers for headers in server.headers)

    def test_a_profile_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_PROFILE", "absent")
        pattern = (
            r"^cannot open s3://bucket/model: .*absent.*; correct AWS_PROFILE, or put the "
            "configuration file on every node$"
        )
        with pytest.raises(DownloadError, match=pattern):
            open_source("s3://bucket/model")

    def test_a_session_token_goes_along(
        self, server: s3.Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SESSION_TOKEN", "TOKEN")
        assert download() == CONTENT
        assert {headers["x-amz-security-token"] for headers in server.headers} == {"TOKEN"}

    def test_expired_ones_are_signed_anew(self, server: s3.Server) -> None:
        server.faults = [s3.Fault("error", "weights", times=1, status=400, code="ExpiredToken")]
        assert download() == CONTENT


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (403, "InvalidObjectState", "the object is archived: restore it, or copy it to a storage"),
        (403, "AccessDenied", "check the credentials and whether they may list and read there"),
        (403, "SignatureDoesNotMatch", "check the secret key, and that no proxy changes the path"),
        (403, "InvalidAccessKeyId", "check that the access key exists in this store"),
        (400, "ExpiredToken", "the session token has expired: get a new one"),
        (403, "RequestTimeTooSkewed", "set the clock of this node, or of the store"),
        (404, "NoSuchBucket", "check bucket, path and endpoint"),
        (404, "NoSuchKey", "check bucket, path and endpoint"),
        (400, "KMS.DisabledException", "check that the object's key is enabled"),
        (301, "PermanentRedirect", "check the region, and that the endpoint is that of the bucket"),
    ],
)
@pytest.mark.parametrize("path", ["bucket", "weights", "config.json"])
def test_every_error_has_the_advice_that_helps(
    status: int, code: str, advice: str, path: str, server: s3.Server
) -> None:
    server.faults = [s3.Fault("error", path, status=status, code=code)]
    with pytest.raises(DownloadError, match=rf"^cannot .*{re.escape(code)}.*; {advice}") as caught:
        download()
    assert "AKIASECRET" not in str(caught.value)


def test_one_client_serves_all_downloads_of_a_process(
    server: s3.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bool] = []
    init = s3_source.Client.__init__

    def counted(client: s3_source.Client, anonymous: bool) -> None:
        made.append(anonymous)
        init(client, anonymous)

    monkeypatch.setattr(s3_source.Client, "__init__", counted)
    monkeypatch.setattr(s3_source, "_clients", {})  # few are kept, and other tests have some
    for _ in range(2):
        open_source("s3://bucket/model")
        open_source("s3://anonymous@bucket/model")
    assert made == [False, True]
    config("[default]\nregion = eu-one-1\n")
    open_source("s3://bucket/model")
    assert made == [False, True, False]


@pytest.mark.parametrize("missing", ["botocore.session", "obstore.store"])
def test_without_a_library(
    missing: str, server: s3.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "obstore.store":
        assert download() == CONTENT  # it only makes many small files faster
        return
    monkeypatch.setattr(s3_source, "_clients", {})
    text = (
        "downloading s3://bucket/model needs the package 'botocore'; install "
        "'rayserve_hooks[download]' on every node"
    )
    with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
        open_source("s3://bucket/model")


class PanicException(BaseException):  # as each library that is written in Rust has its own
    pass


@pytest.mark.parametrize("where", ["obstore.get", "botocore.session.Session", "fetch"])
def test_a_panic_of_a_native_library(
    where: str, server: s3.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(*_: object, **__: object) -> None:
        raise PanicException("request valid: InvalidUri")

    if where == "fetch":
        monkeypatch.setattr("rayserve_hooks.download.cache.fetch", panic)
    else:
        monkeypatch.setattr(where, panic)
        monkeypatch.setattr(s3_source, "_clients", {})
    if where == "obstore.get":
        assert download() == CONTENT
        return
    pattern = (
        r"^(cannot open s3://bucket/model|the download ended): a native library panicked: request "
        "valid: InvalidUri; a library gave up on these settings: check endpoint, region and "
        "credentials$"
    )
    with pytest.raises(DownloadError, match=pattern):
        download()


def test_small_files_are_read_by_obstore(
    server: s3.Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "rayserve_hooks.download"):
        assert download() == CONTENT
    assert "obstore" not in caplog.text
    agents = {headers.get("user-agent", "").partition("/")[0] for headers in server.headers}
    assert agents == {"Botocore", "object_store"}


@pytest.mark.slow
def test_the_same_settings_work_with_stock(moto: str, tmp_path: Path) -> None:
    from ray.llm._internal.common.utils.cloud_filesystem.s3_filesystem import S3FileSystem

    objects = {"m/x#1/a b.txt": b"1", "m/x#1/sub/%41": b"2", "m/x#1/sub/": b""}
    moto_server.fill(moto, "bucket", objects)
    S3FileSystem.download_files(str(tmp_path / "stock"), "s3://bucket/m/x#1")
    path = download_node("org/tiny", Mirror("s3://bucket/m/x#1"), ALL)
    assert path is not None
    both = [
        {
            str(file.relative_to(folder)): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file()
        }
        for folder in (tmp_path / "stock", Path(path))
    ]
    assert both[0] == both[1]


@pytest.mark.parametrize("of_file", [False, True])
def test_the_credentials_of_a_role_come_from_sts(
    moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_file: bool
) -> None:
    """Another service of botocore's: a pod's role, and one that a profile assumes."""
    moto_server.fill(moto, "bucket", {"tiny/config.json": b"{}"})
    monkeypatch.setattr(s3_source, "_clients", {})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    role = "arn:aws:iam::123456789012:role/reader"
    if of_file:
        source = "aws_access_key_id = key\naws_secret_access_key = secret\n"
        role = f"role_arn = {role}\nregion = us-east-1\nsource_profile = one"
        config(f"[default]\n{role}\n[profile one]\n{source}")
    else:
        (tmp_path / "token").write_text("of the pod")
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ROLE_ARN", role)
    assert list(open_source("s3://bucket/tiny").list_files()) == ["config.json"]
    found: Any = s3_source.client_of(False).credentials
    method = "assume-role" if of_file else "assume-role-with-web-identity"
    assert (found.method, bool(found.get_frozen_credentials().token)) == (method, True)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Return a file with a key and a certificate for 127.0.0.1 that it has signed itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = dt.datetime.now(dt.UTC)
    day = dt.timedelta(days=1)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = tmp_path / "certificate.pem"
    file.write_bytes(private + made.public_bytes(pem))
    return file


@pytest.fixture
def tls_server(
    root: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[s3.Server]:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with s3.serving(root, tls=tls) as running:
        running.etags, running.crc64 = "multipart", True
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


@pytest.mark.parametrize(
    "variable", ["SSL_CERT_FILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "ca_bundle"]
)
def test_whom_to_trust(
    variable: str,
    tls_server: s3.Server,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if variable == "ca_bundle":
        config(f"[default]\nca_bundle = {certificate}\n")
    else:
        monkeypatch.setenv(variable, str(certificate))
    with caplog.at_level(logging.DEBUG, "rayserve_hooks.download"):
        assert download() == CONTENT
    assert "obstore" not in caplog.text
    assert "no checksum" not in caplog.text
    assert tls_server.count("HEAD") == 2


class Tunnel(socketserver.BaseRequestHandler):
    """A proxy that opens tunnels to whoever shows the password, and counts them."""

    opened: ClassVar[list[str]] = []
    answer: ClassVar[bytes] = b"200 OK"

    def handle(self) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += self.request.recv(65536)
        method, target, _ = head.split(b"\r\n")[0].split()
        password = b"Proxy-Authorization: Basic dXNlcjpwYXNz\r\n" in head
        self.opened.append(f"{method.decode()} {target.decode()} {password}")
        self.request.sendall(b"HTTP/1.1 " + self.answer + b"\r\n\r\n")
        if not self.answer.startswith(b"200"):
            return
        host, _, port = target.decode().partition(":")
        with socket.create_connection((host, int(port))) as onwards:
            back = threading.Thread(target=self._copy, args=(onwards, self.request))
            back.start()
            self._copy(self.request, onwards)
            back.join()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def tunnel(
    tls_server: s3.Server, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[type[Tunnel]]:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    monkeypatch.setattr(Tunnel, "opened", [])
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Tunnel) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("https_proxy", f"http://user:pass@127.0.0.1:{proxy.server_address[1]}")
        yield Tunnel
        proxy.shutdown()
        thread.join()


def test_tls_goes_through_a_tunnel(tls_server: s3.Server, tunnel: type[Tunnel]) -> None:
    assert download() == CONTENT
    where = tls_server.url.removeprefix("https://")
    assert set(tunnel.opened) == {f"CONNECT {where} True"}
    # The listing, checksums and bytes; a tunnel is kept for further requests.
    assert tls_server.connections == len(tunnel.opened) < len(tls_server.requests)


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        (b"407 Proxy Authentication Required", "the proxy wants a user and a password: write them"),
        (b"403 Forbidden", "check the proxy, and whether it lets this host through"),
    ],
)
def test_a_proxy_that_opens_no_tunnel_is_named(
    answer: bytes, advice: str, tunnel: type[Tunnel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "answer", answer)
    pattern = r"^cannot list s3://bucket/model: the proxy 'http://[^']*127.0.0.1:\d+': .*" + advice
    with pytest.raises(DownloadError, match=pattern) as caught:
        download()
    assert "pass" not in str(caught.value).replace("password", "")


def test_whom_nobody_trusts(tls_server: s3.Server) -> None:
    pattern = (
        "^cannot list s3://bucket/model: https://127.0.0.1:\\d+: ssl.SSLCertVerificationError: "
        ".*CERTIFICATE_VERIFY_FAILED.*; check the server's certificate, and that who signed it is "
        "among the system's, in SSL_CERT_FILE or, for S3, in AWS_CA_BUNDLE$"
    )
    with pytest.raises(DownloadError, match=pattern):
        download()
    assert tls_server.requests == []


def test_certificates_that_cannot_be_read(
    tls_server: s3.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", "/no/such.pem")
    text = (
        "cannot read the certificates that AWS_CA_BUNDLE names: FileNotFoundError: [Errno 2] No "
        "such file or directory: '/no/such.pem'; put the file on every node, or unset the variable"
    )
    with pytest.raises(DownloadError, match=f"^{re.escape(text)}$"):
        download()


def test_without_tls_no_certificates_are_read(
    server: s3.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", "/no/such.pem")
    assert download() == CONTENT
