from __future__ import annotations

import datetime as dt
import ipaddress
import logging
import random
import re
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.download import direct
from rayserve_hooks.download.direct import DirectReader
from rayserve_hooks.download.model import Mirror, download_node
from rayserve_hooks.download.stores import RemoteFile, open_source
from rayserve_hooks.errors import DownloadError

CONTENT = random.Random(0).randbytes(300_000)
SPAN = (100_000, 300_000)
WANTED = CONTENT[slice(*SPAN)]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    weights = tmp_path / "buckets" / "bucket" / "model" / "we ights"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(CONTENT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("RAYSERVE_HOOKS_LOCK_DIR", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(direct, "_BUFFER_BYTES", 2**14)
    return weights.parents[2]


@pytest.fixture
def server(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Server]:
    with s3.serving(root) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


@pytest.fixture
def reader(server: s3.Server) -> Iterator[DirectReader]:
    reader = DirectReader(open_source("s3://bucket/model"))
    yield reader
    reader.close()


@pytest.fixture
def file(server: s3.Server, root: Path) -> RemoteFile:
    weights = root / "bucket" / "model" / "we ights"
    return RemoteFile("we ights", len(CONTENT), server.etag(weights), "1")


def read(reader: DirectReader, file: RemoteFile) -> bytes:
    return b"".join(bytes(part) for part in reader.read(file, SPAN))


def test_a_range(reader: DirectReader, file: RemoteFile, server: s3.Server) -> None:
    assert read(reader, file) == WANTED
    assert server.sent_of("bucket/model/we ights") == len(WANTED)


def test_a_file_without_an_etag(reader: DirectReader) -> None:
    assert read(reader, RemoteFile("we ights", len(CONTENT), None, "1")) == WANTED


def test_a_connection_is_used_again(
    reader: DirectReader, file: RemoteFile, server: s3.Server
) -> None:
    assert read(reader, file) == read(reader, file) == WANTED
    assert server.connections == 1


def test_a_range_that_is_left_alone_takes_its_connection_along(
    reader: DirectReader, file: RemoteFile, server: s3.Server
) -> None:
    parts = reader.read(file, SPAN)
    assert next(parts) == WANTED[: 2**14]
    parts.close()
    assert read(reader, file) == WANTED
    assert server.connections == 2


@pytest.mark.parametrize("kind", ["denied", "missing", "busy"])
def test_what_is_refused_is_left_to_obstore(
    kind: str,
    reader: DirectReader,
    file: RemoteFile,
    server: s3.Server,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.faults = [s3.Fault(kind, times=1)]
    with caplog.at_level(logging.DEBUG, "rayserve_hooks.download"):
        assert read(reader, file) == b""
    status = {"denied": "403", "missing": "404", "busy": "503"}[kind]
    text = (
        "s3://bucket/model: obstore is asked for (100000, 300000) of we ights: ConnectionError: "
        f"the answer is {status} Error, None"
    )
    assert text in caplog.text
    # It has never worked, so it is not tried again.
    assert read(reader, file) == b""
    assert server.count("GET") == 1


def test_what_has_worked_is_tried_again(
    reader: DirectReader, file: RemoteFile, server: s3.Server
) -> None:
    assert read(reader, file) == WANTED
    server.faults = [s3.Fault("busy", times=1)]
    assert read(reader, file) == b""
    assert read(reader, file) == WANTED


@pytest.mark.parametrize("kind", ["truncated", "reset"])
def test_a_body_that_breaks_off_ends_early(
    kind: str, reader: DirectReader, file: RemoteFile, server: s3.Server
) -> None:
    server.faults = [s3.Fault(kind, times=1)]
    got = read(reader, file)
    assert len(got) < len(WANTED)
    assert WANTED.startswith(got)


def test_another_version_is_refused(reader: DirectReader, server: s3.Server) -> None:
    assert read(reader, RemoteFile("we ights", len(CONTENT), '"other"', "1")) == b""


def test_an_object_of_another_size_is_refused(reader: DirectReader, file: RemoteFile) -> None:
    assert read(reader, RemoteFile("we ights", 400_000, file.etag, "1")) == b""


def test_nobody_listens(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    reader = DirectReader(open_source("s3://bucket/model"))
    assert read(reader, RemoteFile("we ights", len(CONTENT), None, "1")) == b""


@pytest.mark.parametrize(
    ("environment", "direct"),
    [
        ({"http_proxy": "http://127.0.0.1:1"}, False),
        ({"all_proxy": "http://127.0.0.1:1"}, False),
        ({"http_proxy": "http://127.0.0.1:1", "no_proxy": "127.0.0.1"}, True),
        ({"https_proxy": "http://127.0.0.1:1"}, True),
    ],
)
def test_a_proxy_is_left_to_obstore(
    environment: dict[str, str],
    direct: bool,
    reader: DirectReader,
    file: RemoteFile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert read(reader, file) == (WANTED if direct else b"")


def test_anonymous_reading_signs_nothing(server: s3.Server) -> None:
    anonymous = open_source("s3://anonymous@bucket/model")
    assert anonymous.readable_url_of("we ights") == f"{server.url}/bucket/model/we%20ights"
    signed = open_source("s3://bucket/model").readable_url_of("we ights")
    assert signed.startswith(f"{server.url}/bucket/model/we%20ights?X-Amz-Algorithm=")
    reader = DirectReader(anonymous)
    assert read(reader, RemoteFile("we ights", len(CONTENT), None, "1")) == WANTED
    reader.close()


def test_other_stores_are_left_to_obstore(
    server: s3.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    reader = DirectReader(open_source("gs://anonymous@bucket/model"))
    assert read(reader, RemoteFile("we ights", len(CONTENT), None, "1")) == b""
    assert server.requests == []


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
    for variable in ("SSL_CERT_FILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(variable, raising=False)
    with s3.serving(root, tls=tls) as running:
        running.etags, running.crc64 = "multipart", True
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


def download() -> bytes:
    everything = NodeModelDownloadable.MODEL_AND_TOKENIZER
    path = download_node("org/tiny", Mirror("s3://anonymous@bucket/model"), everything)
    assert path is not None
    return Path(path, "we ights").read_bytes()


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
def test_whom_to_trust(
    variable: str,
    tls_server: s3.Server,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(variable, str(certificate))
    with caplog.at_level(logging.DEBUG, "rayserve_hooks.download"):
        assert download() == CONTENT
    assert "obstore is asked" not in caplog.text
    assert "no checksum" not in caplog.text
    assert tls_server.count("HEAD") == 1


def test_whom_only_obstore_trusts(
    tls_server: s3.Server,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    nothing = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    monkeypatch.setattr(ssl, "create_default_context", lambda: nothing)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with caplog.at_level(logging.DEBUG, "rayserve_hooks.download"):
        assert download() == CONTENT
    assert re.search(r"obstore is asked for .* CERTIFICATE_VERIFY_FAILED", caplog.text)


@pytest.mark.slow
def test_whom_nobody_trusts(tls_server: s3.Server) -> None:
    pattern = (
        "^cannot list s3://anonymous@bucket/model: .* error sending request: InvalidCertificate: "
        "UnknownIssuer; check the server's certificate, and that who signed it is among the "
        "system's, in SSL_CERT_FILE or, for S3, in AWS_CA_BUNDLE$"
    )
    with pytest.raises(DownloadError, match=pattern):
        download()


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
    reader: DirectReader, file: RemoteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", "/no/such.pem")
    assert open_source("s3://bucket/model").list_files()
    assert read(reader, file) == WANTED
