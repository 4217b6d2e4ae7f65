"""Where secrets are in texts."""

from __future__ import annotations

import base64
import json
import shlex
import time
import urllib.parse
from typing import Any

import pydantic
import pytest

from rayserve_hooks.core.masking import redact
from rayserve_hooks.core.secret_texts import MASK

S = "Zq8w9KdV"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"url: /p?sig={S}&se=1 (x)", "url: /p?sig=***&se=*** (x)"),
        (f"AccountName=a;AccountKey={S}/+==;X=c", "AccountName=a;AccountKey=***;X=c"),
        (f"SharedAccessSignature=sv=1&sig={S}%3D;X=1", "SharedAccessSignature=***;X=1"),
        (f"Server=a;Password={S};", "Server=a;Password=***;"),
        (f"host=h password={S} dbname=b", "host=h password=*** dbname=b"),
        (f"postgres://u:{S}@h/db", "postgres://***@h/db"),
        (f"redis://:{S}@h", "redis://***@h"),
        (f"https://{S}@h/x", "https://***@h/x"),
        (f"https://u:a/{S}@h/x", "https://***@h/x"),
        ("s3://anonymous@b/x", "s3://anonymous@b/x"),
        ("https://host:8080/a", "https://host:8080/a"),
        (f"Authorization: Bearer {S}", "Authorization: Bearer ***"),
        (f"401: Bearer {S} rejected", "401: Bearer *** rejected"),
        (f"(b'authorization', b'Basic {S}')", "(b'authorization', b'***')"),
        (f"headers=['X-Api-Key', '{S}']", "headers=['X-Api-Key', '***']"),
        (f'{{"password": "{S}", "a": 1}}', '{"password": "***", "a": 1}'),
        (f'{{\\"api_key\\": \\"{S}\\"}}', '{\\"api_key\\": \\"***\\"}'),
        (f"Settings(host='x', hf_token='{S}')", "Settings(host='x', hf_token='***')"),
        (f"run --password {S} --x", "run --password *** --x"),
        (f"Cookie: a={S}; b={S}", "Cookie: ***"),
        (
            f"-----BEGIN RSA PRIVATE KEY-----\n{S}\n{S}\n-----END RSA PRIVATE KEY-----",
            "-----BEGIN RSA PRIVATE KEY-----***-----END RSA PRIVATE KEY-----",
        ),
        (f"<AWSAccessKeyId>{S}</AWSAccessKeyId><Code>a</Code>", None),
        (f'<add key="ApiKey" value="{S}"/>', '<add key="ApiKey" value="***"/>'),
        (f"{{'name': 'HF_TOKEN', 'value': '{S}'}}", "{'name': 'HF_TOKEN', 'value': '***'}"),
        (f"- name: HF_TOKEN\n  value: {S}\n", "- name: HF_TOKEN\n  value: ***\n"),
        (f"password: >-\n  {S}\n  {S}\nnext: 1", "password: ***\nnext: 1"),
        (f'Authorization: Digest username="a", response="{S}"', "Authorization: ***"),
        (f"run -token {S} -x", "run -token *** -x"),
        (f"jdbc:oracle:thin:scott/{S}@h:1521:x", "jdbc:oracle:thin:***@h:1521:x"),
        (f"wrong password '{S}'", "wrong password '***'"),
        (f"Incorrect API key provided: {S}.", "Incorrect API key provided: ***"),
        (f"nvapi-{S}{S}{S} and npm_{S}{S}", "*** and ***"),
        ("the API key is missing, the password was refused", None),
        ("secret 'weights-store' not found", None),
        ("<name>abc</name>, name='a' value='b'", None),
        ("invalid token: expected a string", "invalid token: expected a string"),
        ("eos_token='</s>', max_tokens=5", "eos_token='</s>', max_tokens=5"),
        ("Bearer authentication failed", "Bearer authentication failed"),
        ("token_file=/run/secrets/a is missing", "token_file=/run/secrets/a is missing"),
    ],
)
def test_what_a_text_names_as_a_secret(text: str, clean: str | None) -> None:
    clean = text.replace(S, MASK) if clean is None else clean
    assert redact(text) == clean
    assert redact(clean) == clean


class Settings(pydantic.BaseModel, extra="forbid"):
    hf_token: int = 0
    nested: dict[str, int] = pydantic.Field(default_factory=dict)
    size: int = 0
    more: list[int] = pydantic.Field(default_factory=list)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"hf_token": S}, False),
        ({"nested": {"api_key": S}}, False),
        ({"password": S}, False),
        ({"more": {"password_of_the_database_server_a": S}}, False),
        ({"size": S}, True),
    ],
)
def test_what_pydantic_refuses_in_a_field_that_names_a_secret(
    values: dict[str, Any], shown: bool
) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        Settings(**values)
    text = str(caught.value)
    assert S[-4:] in text
    assert (S[-4:] in redact(text)) is shown


@pytest.mark.parametrize(
    "piece", ["\\", "'", '"', "%25", "&#0", "<a ", "name='a' value", "password "]
)
def test_a_long_text_of_the_same_is_masked_soon(piece: str) -> None:
    started = time.process_time()
    redact((piece * 20_000)[:20_000], {"password": KNOWN})
    assert time.process_time() - started < 3, "it is not quadratic"


KNOWN = "p@ss/w+rd \u00e9\"x'y\nline two of it"


@pytest.mark.parametrize(
    "written",
    [
        KNOWN,
        repr(KNOWN),
        repr(repr(KNOWN)),
        json.dumps(KNOWN),
        json.dumps(json.dumps(KNOWN)),
        repr(KNOWN.encode()),
        urllib.parse.quote(KNOWN, safe=""),
        urllib.parse.quote(urllib.parse.quote(KNOWN)).lower(),
        urllib.parse.quote_plus(KNOWN),
        KNOWN.encode().hex(),
        base64.b64encode(KNOWN.encode()).decode(),
        base64.b64encode(b"user:" + KNOWN.encode()).decode(),
        base64.urlsafe_b64encode(b"me:" + KNOWN.encode() + b":x").decode(),
        "line two of it",
        "".join(f"%{byte:02X}" for byte in KNOWN.encode()),
        "".join(f"\\u{ord(char):04x}" for char in KNOWN),
        "".join(f"\\x{byte:02x}" for byte in KNOWN.encode()),
        "".join(f"\\{byte:03o}" for byte in KNOWN.encode()),
        "".join(f"&#{ord(char)};" for char in KNOWN),
        "".join(f"&#x{ord(char):X};" for char in KNOWN),
        KNOWN.encode().hex(":").upper(),
        repr(list(KNOWN.encode()))[1:-1],
        repr(KNOWN.encode("utf-16-le")),
        base64.encodebytes(b"x" * 50 + KNOWN.encode() + b"y" * 60).decode().strip(),
        shlex.quote(KNOWN),
        KNOWN.replace('"', '""').replace("'", "''"),
    ],
)
def test_a_known_secret_however_it_is_written(written: str) -> None:
    clean = redact(f"got {written} there", {"password": KNOWN})
    assert clean.replace('"', "").replace("'", "").replace("\\", "") in (
        "got *** there",
        "got b*** there",
    )


def test_a_variable_of_this_process_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_HF_TOKEN", S)
    monkeypatch.setenv("DATABASE_URL", "postgres://u:pw-of-it@h")
    assert redact(f"got {S} and pw-of-it") == "got *** and ***"
