"""What tests of stores share: an environment without settings, and a server of S3's own keys."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import moto_server
import pytest

from rayserve_hooks.download import reader


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove all settings of stores and proxies; add credentials, and a cache of its own."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_", "STORAGE_")) or name.lower() in (
            "http_proxy",
            "https_proxy",
            "all_proxy",
            "no_proxy",
            "ssl_cert_file",
            "requests_ca_bundle",
        ):
            monkeypatch.delenv(name)
    settings = {
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "aws-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "aws-credentials"),
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "RAYSERVE_HOOKS_LOCK_DIR": str(tmp_path / "locks"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(reader, "BACKOFF_S", 0.001)


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    with moto_server.serving() as url:
        yield url


@pytest.fixture
def moto(moto_url: str, clean: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the URL of a server of S3 without buckets, which the settings name."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_url)
    yield moto_url
    moto_server.empty(moto_url)
