"""Where secrets are in texts."""

from __future__ import annotations

import base64
import json
import urllib.parse

import pytest

from rayserve_hooks.core.masking import redact

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
        ("invalid token: expected a string", "invalid token: expected a string"),
        ("eos_token='</s>', max_tokens=5", "eos_token='</s>', max_tokens=5"),
        ("Bearer authentication failed", "Bearer authentication failed"),
        ("token_file=/run/secrets/a is missing", "token_file=/run/secrets/a is missing"),
    ],
)
def test_what_a_text_names_as_a_secret(text: str, clean: str) -> None:
    assert redact(text) == clean
    assert redact(clean) == clean


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
