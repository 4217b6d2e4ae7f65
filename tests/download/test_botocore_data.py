"""What our reader of botocore's data says is what botocore's own says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import botocore.session
import pytest
from botocore.exceptions import DataNotFoundError
from botocore.loaders import Loader, create_loader

from rayserve_hooks.download.botocore_data import data_loader


@pytest.fixture
def ours() -> Loader:
    return data_loader(None)


@pytest.mark.parametrize("service", ["s3", "sts", "sso", "sso-oidc", "signin"])
@pytest.mark.parametrize("kind", ["service-2", "paginators-1", "endpoint-rule-set-1", "waiters-2"])
def test_services_are_as_botocore_reads_them(ours: Loader, service: str, kind: str) -> None:
    theirs = create_loader()
    try:
        expected = theirs.load_service_model(service, kind)
    except DataNotFoundError:  # of which UnknownServiceError is one
        with pytest.raises(DataNotFoundError):
            ours.load_service_model(service, kind)
    else:
        assert ours.load_service_model(service, kind) == expected
        assert ours.determine_latest_version(service, kind) == theirs.determine_latest_version(
            service, kind
        )


@pytest.mark.parametrize("name", ["endpoints", "partitions", "sdk-default-configuration", "_retry"])
def test_what_is_of_no_service(ours: Loader, name: str) -> None:
    assert ours.load_data(name) == create_loader().load_data(name)


def test_what_botocore_writes_into_is_of_one_session_alone() -> None:
    session = botocore.session.Session()
    loader = data_loader(None)
    session.register_component("data_loader", loader)
    session.create_client("s3", "eu-central-1", aws_access_key_id="a", aws_secret_access_key="b")
    as_read = create_loader().load_data("endpoints")
    assert loader.load_data("endpoints") != as_read
    assert data_loader(None).load_data("endpoints") == as_read


def test_the_order_is_that_of_the_file(ours: Loader) -> None:
    found = ours.load_service_model("s3", "service-2")["shapes"]
    assert list(found) == list(create_loader().load_service_model("s3", "service-2")["shapes"])


@pytest.mark.parametrize("name", ["no such", "", "endpoints.json"])
def test_a_service_that_is_not_there(ours: Loader, name: str) -> None:
    with pytest.raises(DataNotFoundError):
        ours.load_service_model(name, "service-2")


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_the_users_own_folders_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setenv("MODELS", str(tmp_path))
    folder = tmp_path / "s3" / "2099-01-01"
    folder.mkdir(parents=True)
    text = json.dumps({"metadata": {}, "operations": {"Ours": {}}}).encode()
    (folder / f"service-2{suffix}").write_bytes(gzip.compress(text) if "gz" in suffix else text)
    path = f"/no/such:$MODELS/{suffix}/..:$MODELS"
    ours, theirs = data_loader(path), create_loader(path)
    assert ours.search_paths == theirs.search_paths
    found = ours.load_service_model("s3", "service-2")
    assert found == theirs.load_service_model("s3", "service-2")
    assert found["operations"] == {"Ours": {}}


def test_a_file_that_is_damaged_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "s3" / "2099-01-01").mkdir(parents=True)
    (tmp_path / "s3" / "2099-01-01" / "service-2.json").write_text("{")
    with pytest.raises(ValueError, match="Expecting"):
        data_loader(str(tmp_path)).load_service_model("s3", "service-2")
    with pytest.raises(ValueError, match="Expecting"):
        create_loader(str(tmp_path)).load_service_model("s3", "service-2")
