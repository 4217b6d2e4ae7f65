import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretBytes, SecretStr

from rayserve_hooks.context import NodeModelDownloadable
from rayserve_hooks.core.masking import is_secret, redact, shown
from rayserve_hooks.core.secret_texts import MASK


@pytest.mark.parametrize(
    "key",
    [
        "password",
        "db_passwd",
        "passphrase",
        "client_secret",
        "google_application_credentials",
        "hf_token",
        "HF_TOKEN",
        "HFToken",
        "token_file",
        "api_key",
        "apiKey",
        "aws_access_key_id",
        "account_key",
        "private_keys",
        "auth",
        "proxy-authorization",
        "session_cookie",
        "sas",
        "sas_url",
        "bearer",
        "env_vars",
    ],
)
def test_a_key_that_looks_like_a_secret(key: str) -> None:
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    [
        "tokenizer",
        "max_num_batched_tokens",
        "tokens",
        "author",
        "passes",
        "bypass_cache",
        "key",
        "keys",
        "monkey",
        "primary_key",
        "cache_dir",
        "cookies_allowed",
        "disaster",
        7,
        None,
    ],
)
def test_a_key_that_does_not(key: object) -> None:
    assert not is_secret(key)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "1"),
        (1.5, "1.5"),
        (True, "True"),
        (None, "None"),
        ("a", "'a'"),
        (NodeModelDownloadable.NONE, "<NodeModelDownloadable.NONE: 'NONE'>"),
        (Path("/models"), "PosixPath('/models')"),
        ({"a": 1}, "{'a': 1}"),
        ({"seed": 1, "hf_token": "s3cret"}, "{'seed': 1, 'hf_token': ***}"),
        ({"a": {"password": "s3cret"}}, "{'a': {'password': ***}}"),
        ([1, {"password": "s3cret"}], "[1, {'password': ***}]"),
        (("a", "b"), "['a', 'b']"),
        (object(), "<object>"),
        (b"s3cret", "<bytes>"),
        (SecretStr("s3cret"), MASK),
        (SecretBytes(b"s3cret"), MASK),
        ({"plain": [SecretStr("s3cret")]}, "{'plain': [***]}"),
        ("https://me:s3cret@host/x", "'https://***@host/x'"),
        ("s3://bucket/x", "'s3://bucket/x'"),
    ],
)
def test_a_value_is_shown_without_secrets(value: object, text: str) -> None:
    assert shown(value) == text


def test_a_value_that_is_a_secret_shows_nothing() -> None:
    assert shown({"a": 1}, secret=True) == MASK


def test_a_long_value_is_cut_short() -> None:
    text = shown("a" * 200)
    assert len(text) == 80
    assert text.endswith("aaa...")


def test_a_long_value_is_masked_before_it_is_cut() -> None:
    assert "s3cret" not in shown({"hf_token": "s3cret", "text": "a" * 200})


class Client:
    """Has a method named as pydantic's secrets have one, as boto3's client of a secret store."""

    def get_secret_value(self, name: str) -> str:
        raise AssertionError("asked the store for a secret")


def test_a_client_of_a_secret_store_is_no_secret_and_is_not_asked() -> None:
    assert shown(Client()) == "<Client>"
    assert redact("boom", {"client": Client()}) == "boom"


def test_a_subclass_of_a_secret_is_masked() -> None:
    class ApiKey(SecretStr):
        pass

    assert shown(ApiKey("s3cret")) == MASK


@pytest.mark.parametrize(
    "values",
    [
        {"hf_token": "s3cret-1"},
        {"env_vars": {"HF_TOKEN": "s3cret-1"}},
        {"runtime_env": {"env_vars": {"HF_TOKEN": "s3cret-1"}}},
        {"credentials": {"a": {"b": "s3cret-1"}}},
        {"api_keys": ["other", "s3cret-1"]},
        {"stores": [{"password": "s3cret-1"}]},
        {"plain": SecretStr("s3cret-1")},
    ],
)
def test_a_secret_is_masked_in_a_text_of_others(values: Any) -> None:
    assert redact("401 for s3cret-1, s3cret-1", values) == "401 for ***, ***"


def test_a_value_under_a_plain_key_stays_in_a_text() -> None:
    assert redact("no bucket weights", {"bucket": "weights"}) == "no bucket weights"


def test_a_short_secret_stays_for_masking_it_would_garble_the_text() -> None:
    assert redact("a b c", {"hf_token": "a"}) == "a b c"


def test_a_secret_that_holds_another_is_masked_whole() -> None:
    values = {"password": "s3cret", "hf_token": "s3cret-and-more"}
    assert redact("got s3cret-and-more", values) == "got ***"


def test_user_and_password_of_an_address_are_masked_in_a_text() -> None:
    assert redact("GET https://me:s3cret@host/x failed", {}) == "GET https://***@host/x failed"


def test_secrets_that_are_no_text_leave_a_text_alone() -> None:
    values = {"password": 123456, "hf_token": None, "secret": SecretBytes(b"s3cret")}
    assert redact("123456 None", values) == "123456 None"


def test_masking_imports_no_pydantic() -> None:
    code = "import sys, rayserve_hooks.core.masking; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_placement_group_is_shown_by_its_id() -> None:
    class PlacementGroup:  # Ray's has an id with hex(), too
        id = bytes([1, 171])

    assert shown(PlacementGroup()) == "<PlacementGroup 01ab>"
