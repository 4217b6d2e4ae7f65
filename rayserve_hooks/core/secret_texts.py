"""Where secrets are in a text: by what stands around them, and however a known one is written."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator
from typing import Any

Span = tuple[int, int]

MASK = "***"

# Of models, not of accounts.
_NO_CREDENTIAL = (
    *("added", "audio", "bos", "cls", "eos", "first", "image", "mask", "next", "pad", "per"),
    *("sep", "special", "stop", "unk", "video"),
)
_SECRET_NAME = re.compile(
    r"passw|passphrase|secret|credential|bearer|connection_?str|conn_?str"
    r"|(?:api|access|account|encryption|functions?|master|private|session|shared|signing|ssh"
    r"|storage|subscription)[_-]?keys?(?:$|[^a-z0-9])"
    rf"|{''.join(f'(?<!{name}_)' for name in _NO_CREDENTIAL)}"
    r"token(?:$|[^a-z0-9s])"  # but no tokenizer, and no max_num_batched_tokens
    r"|(?:^|[^a-z0-9])(?:auth|authorization|cookie|dsn|jwt|pass|pwd|sas|sig|signature)"
    r"(?:$|[^a-z0-9])"
)
_NO_SECRET_NAME = re.compile(
    r"(?:algorithm|count|enabled|length|method|mode|name|provider|scheme|timeout|ttl|type)$"
)
_PLACE_NAME = re.compile(r"(?:credentials?|dir|file|path|pwd|sock)$")
_PLACE = re.compile(r"(?:/[\w.@+-]+){2,}/?")
_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def names_secret(key: Any) -> bool:
    """Return whether a key looks like that of a secret, such as ``hf_token`` or ``apiKey``."""
    if not issubclass(type(key), str):  # whose text may be anybody's code
        return False
    name = _CAMEL_CASE.sub("_", str.__str__(key)).lower()
    return bool(_SECRET_NAME.search(name)) and not _NO_SECRET_NAME.search(name)


def names_place(key: Any, value: Any) -> bool:
    """Return whether a value is where a secret is kept, which the text of an error needs."""
    if not issubclass(type(key), str) or not issubclass(type(value), str):
        return False
    return bool(_PLACE_NAME.search(str.lower(key)) and _PLACE.fullmatch(value))


_KEY = re.compile(
    r"""
    (?<!callback\ ['"])  # which names one in our own texts
    (?:(?P<option>(?<![\w-])--?)|(?<![\w-]))(?P<name>[A-Za-z_][\w-]{0,99})
    (?:(?:\\*["'])?\]?\s{0,3}(?P<separator>[=-]>|:=|==?|:(?!//)|%3D|\\u003d)\s{0,3}|(?P<blank>[ ]))
    """,
    re.VERBOSE | re.IGNORECASE,
)
_PAIR = re.compile(r"""[(\[]\s*b?(?P<q>\\*["'])(?P<name>[\w-]{1,99})(?P=q)\s*,\s*(?=b?\\*["'])""")
_PAIR_ENDS = re.compile(r"\s*,?\s*[)\]]")
_VALUE = re.compile(
    r"""
      [bru]?(?P<q>\\*["'])(?P<quoted>(?:(?!(?P=q))(?:\\.|.))*)
    | (?P<braces>\[[^\[\]]*\]|\{[^{}]*\}|[A-Za-z][\w.]*\([^()\n]*\))
    | (?P<line>(?:AWS4\S*|Digest|SharedKey\w*)\s+(?:"[^"\r\n]*"|[^\r\n"'])+)
    | (?P<block>[|>][+-]?[ \t]*(?:\n[ \t]+\S[^\n]*)+)  # of YAML
    | (?:Bearer|Basic|Token|ApiKey|Key|Negotiate|Splunk)\s+(?P<credentials>[^\s"',;)\]}>]+)
    | (?P<field>[^;'"\n]+)(?=;\s?[A-Za-z][\w ]{0,40}=)  # of a connection string
    | (?P<plain>[^\s;&'"<>]+)
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_NAME_AND_VALUE = re.compile(  # in XML's attributes, and in the environment of a container
    r"""
    \b(?:key|name)(?:\\*["'])?\s*[=:]\s*(?P<n>\\*["']|)(?P<name>[\w.-]{1,99})(?P=n)[\s,]+
    (?:\\*["'])?value(?:\\*["'])?\s*[=:]\s*
    (?:b?(?P<q>\\*["'])(?P<quoted>(?:(?!(?P=q)).)*)|(?P<plain>[^\s,;<>}"']+))
    """,
    re.VERBOSE | re.IGNORECASE,
)
_ELEMENT = re.compile(r"<(?P<name>[A-Za-z_][\w.:-]{0,99})(?:\s[^<>]*)?>(?P<value>[^<>]+)</")
_REFUSED = re.compile(  # as those who refuse one write it
    r"""
    (?i:\b(?:passw(?:or)?d|passphrase|(?:api|access|secret)[ _-]?key|(?:access|auth)[ _-]token)
    (?:\ (?:is|was|provided))?:?\ )
    (?:(?P<q>\\*["'])(?P<quoted>[^\s"'\\]{6,})(?P=q)
    | (?=[^\s"',;]*\d)(?=[^\s"',;]*[A-Za-z])(?P<plain>[^\s"',;]{8,}))
    """,
    re.VERBOSE,
)
_FIELD = re.compile(  # as pydantic refuses one
    r"^(?P<name>\S.*)\n  .*\[type=\w+, input_value=(?P<value>.*), input_type=\w+\]$",
    re.MULTILINE,
)
_LINE = re.compile(r"""[^\r\n"'\\]*""")
_NOTHING = re.compile(r"(?:none|null|true|false|\.\.\.|\*+)?", re.IGNORECASE)
_PROSE = re.compile(r"[A-Za-z]?[a-z]+[,.]?")
_WORD_FOLLOWS = re.compile(r"\s+\w")


def _named(text: str, quoted: bool) -> Iterator[Span]:
    """Yield the values of what is named as a secret: in arguments, JSON, headers, settings."""
    for match in _KEY.finditer(text):
        name = match["name"].removeprefix("u0026")  # of an & in JSON
        if (match["separator"] or match["option"]) and names_secret(name):
            span = _value(text, match)
            if span and (text[span[0] - 1] in "\"'" or not quoted):
                yield span
    for match in _PAIR.finditer(text):
        value = _VALUE.match(text, match.end())
        # A pair and nothing more, or it is a list of names.
        if value is not None and names_secret(match["name"]):
            end = value.end() + len(value["q"] or "")
            if _PAIR_ENDS.match(text, end):
                yield value.span("quoted")
    for match in _NAME_AND_VALUE.finditer(text):
        kind = match.lastgroup or ""
        if names_secret(match["name"]) and (kind == "quoted" or not quoted):
            yield match.span(kind)


def _value(text: str, key: re.Match[str]) -> Span | None:
    """Return where the value of what is named as a secret is, if it has one that is a secret."""
    match = _VALUE.match(text, key.end())
    if match is None:
        return None
    kind, name = match.lastgroup or "", key["name"].lower()
    begin, end = match.span(kind)
    if kind in ("plain", "field") and "cookie" in name:
        end = _LINE.match(text, begin).end()  # type: ignore[union-attr]
    elif kind in ("plain", "line"):
        end = begin + len(text[begin:end].rstrip("),.]}:"))
    value = text[begin:end]
    number = value.isdecimal() and "token" in name
    prose = key["separator"] == ":" and kind == "plain" and _PROSE.fullmatch(value)
    if names_place(key["name"], value):
        return None
    if number or _NOTHING.fullmatch(value) or (prose and _WORD_FOLLOWS.match(text, match.end())):
        return None
    return begin, end


def _told(text: str) -> Iterator[Span]:
    """Yield the values of what is named as a secret in texts for people and in XML."""
    for match in _ELEMENT.finditer(text):
        if names_secret(match["name"]):
            yield match.span("value")
    for match in _REFUSED.finditer(text):
        yield match.span(match.lastgroup or "")
    for match in _FIELD.finditer(text):
        # In what pydantic has cut, the name may be gone.
        cut = "..." in match["value"] and match["value"][0] not in "'\""
        if cut or any(map(names_secret, match["name"].split("."))):
            yield match.span("value")


_IN_URL = re.compile(
    r"""
    (?P<scheme>[A-Za-z][\w+.-]{0,40})(?:://|%3A%2F%2F)(?!arn:)(?:
        (?P<user>[^\s/@]*:[^/\s]*)@
      # A password may have a slash or an @; a port has none of them.
      | (?!(?:[^\s/@:]*|\[[^\s\]]*\]):\d{1,5}(?:[/?\#]|$))(?P<more>[^\s"'<>/?\#@:]*:[^\s"'<>]*)@
      | (?P<alone>[^\s"'<>/?\#@:%]+)@
      | (?P<encoded>[^\s"'<>/?\#@:]*?(?:%3A|:)[^\s"'<>/?\#@:]*?)%40
    )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_URL = re.compile("://|%3A%2F%2F", re.IGNORECASE)
# Where what stands before the @ is a container, an account or 'anonymous'.
_NAMED_STORES = ("s3", "s3a", "s3n", "gs", "gcs", "az", "azure", "adl", "abfs", "abfss", "wasb")


def _in_urls(text: str) -> Iterator[Span]:
    if not _URL.search(text):  # the other expression takes long for long words
        return
    for match in _IN_URL.finditer(text):
        kind = match.lastgroup or ""
        scheme = re.split(r"[-+._]", match["scheme"].lower())[-1]
        store = scheme in _NAMED_STORES or scheme.removesuffix("s") in _NAMED_STORES
        if not (kind == "alone" and store):
            yield match.span(kind)


_PEM = r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----(?P<secret>.*?)(?:-----END|\Z)"
_BEARER = (
    r"(?i:\b(?:bearer|basic)\s+)(?!(?i:auth|cred|scheme|token|realm|head|challenge|is|was|in)\w*\b)"
    r"(?P<secret>[A-Za-z0-9._~+/=-]{8,})"
)
_NETRC = r"\blogin\s+\S+\s+password\s+(?P<secret>\S+)"
_ORACLE = r":(?:thin|oci):(?P<secret>[^\s@/:]*/[^\s@]+)@"
_ISSUED = (  # by those who give all of theirs one beginning
    r"\b(?P<secret>hf_[A-Za-z0-9]{16,}|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
    r"|glpat-[\w-]{16,}|sk-[\w-]{16,}|xox[abeprs]-[\w-]{10,}|A[KS]IA[A-Z0-9]{16}"
    r"|(?:npm|gsk|r8|dop_v1|[rs]k_(?:live|test))_[A-Za-z0-9]{16,}|(?:nvapi|pypi)-[\w-]{16,}"
    r"|(?:hvs|ya29|SG)\.[\w.-]{16,}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?)"
)
_SHAPES = [re.compile(shape, re.DOTALL) for shape in (_PEM, _BEARER, _NETRC, _ORACLE, _ISSUED)]
_QUERY = re.compile(
    r"(?:\?|%3F)(?=[\w.%~\[\]-]{1,99}?(?:=|%3D))[^\s\"'<>]*(?<![),.;:\]}])", re.IGNORECASE
)
_PARAMETER = re.compile(r"(?:=|%3D)(?P<value>.*?)(?=&|;|%26|\\u0026|$)", re.IGNORECASE)


def given_away(text: str, *, quoted: bool = False) -> Iterator[Span]:
    """Yield where a text names what it shows as a secret, or shows what can be nothing else.

    Of what it names, with ``quoted`` only what is in quotation marks.
    """
    yield from _named(text, quoted)
    if not quoted:
        yield from _told(text)
    yield from _in_urls(text)
    for shape in _SHAPES:
        for match in shape.finditer(text):
            yield match.span("secret")


def queries(text: str) -> Iterator[Span]:
    """Yield the values in the queries of URLs, signatures among them."""
    for query in _QUERY.finditer(text):
        for match in _PARAMETER.finditer(text, *query.span()):
            yield match.span("value")


_GAP = r"(?:\s|\\{1,8}[nrt]|%(?:25)*(?:0[9AD]|20)|\+)+"
_ENTITIES = {"&": "amp", "<": "lt", ">": "gt", '"': "quot", "'": "apos"}
_QUOTED = {"'": r"'(?:'|\\{1,8}''|\"'\"')", '"': '""'}  # in SQL, CSV and shells
_BASE64 = {"+": r"(?:\+|-|%2B)", "/": r"(?:\\{0,8}/|_|%2F)"}
_AROUND_BASE64 = re.compile(r"[A-Za-z0-9+=_-]|%3D")
_SHORTEST_CODED = 7


def occurrences(text: str, secrets: Iterable[str]) -> Iterator[Span]:
    """Yield where a text shows known secrets, however each is written.

    As it is, or quoted, escaped or encoded for a string of Python, JSON, HTML or a URL, and in
    hexadecimal or base64, alone or together with what stands around it.
    """
    plain, places = _unescaped(text)
    for secret in secrets:
        yield from _occurrences(text, secret)
        if plain != text:
            yield from ((places[a], places[b]) for a, b in _occurrences(plain, secret))


_ESCAPE = re.compile(
    r"""
      (?:%(?:25)*|\\{1,8}x|\\{1,8}u00|&\#x0*)(?P<hex>[2-7][0-9a-f]|0[9ad]|[9ad](?=;));?
    | &\#0*(?P<decimal>\d{1,3});
    | \\{1,8}(?P<octal>[01][0-7]{2})
    | \\{1,8}x00 | \0  # of UTF-16
    # In base64; what it begins with comes first, since looking back takes long.
    | (?=[\\\r\n])(?<=[A-Za-z0-9+/_-]{60})(?:\\{1,8}r|\r)?(?:\\{1,8}n|\n)[ \t]*
      (?=[A-Za-z0-9+/_=-])
    """,
    re.VERBOSE | re.IGNORECASE,
)
_BASES = {"hex": 16, "decimal": 10, "octal": 8}


def _unescaped(text: str) -> tuple[str, list[int]]:
    """Return a text without the escapes of what needs none, letters and digits above all.

    And where each of its characters, and its end, is in the text given.
    """
    pieces: list[str] = []
    places: list[int] = []
    done = 0
    for match in _ESCAPE.finditer(text):
        kind = match.lastgroup
        char = chr(int(match[kind], _BASES[kind])) if kind else ""
        if not re.fullmatch(r"[\w\s]?", char, re.ASCII):
            continue
        pieces += [text[done : match.start()], char]
        places += [*range(done, match.start()), *([match.start()] if char else [])]
        done = match.end()
    if not done:
        return text, places
    return "".join([*pieces, text[done:]]), [*places, *range(done, len(text) + 1)]


def _occurrences(text: str, secret: str) -> Iterator[Span]:
    data = secret.encode("utf-8", "surrogatepass")
    pairs = r"[\s:]?".join(f"{byte:02x}" for byte in data)
    numbers = r"(?<!\d)" + r",\s*".join(map(str, data)) + r"(?!\d)"
    for written in (_written(secret), pairs, numbers):
        for match in re.finditer(written, text, re.IGNORECASE):
            yield match.span()
    for core in _base64_of(data):
        for match in re.finditer(core, text, re.IGNORECASE):
            yield _widened(text, *match.span())


def _written(secret: str) -> str:
    return "".join(map(_forms, re.findall(r"\s+|\S", secret)))


def _forms(char: str) -> str:
    if char.isspace():
        return _GAP
    if char.isascii() and (char.isalnum() or char == "_"):
        return char
    data, number = char.encode("utf-8", "surrogatepass"), ord(char)
    utf_16 = char.encode("utf-16-be", "surrogatepass").hex()
    forms = [
        r"\\{1,8}" if char == "\\" else rf"\\{{0,8}}{re.escape(char)}",
        "".join(rf"%(?:25)*{byte:02x}" for byte in data),
        "".join(rf"\\{{1,8}}x{byte:02x}" for byte in data),
        "".join(rf"\\{{1,8}}{byte:03o}" for byte in data),
        "".join(rf"\\{{1,8}}u{utf_16[i : i + 4]}" for i in range(0, len(utf_16), 4)),
        rf"\\{{1,8}}U{number:08x}",
        rf"&\#(?:{number}|x0*{number:x});",
    ]
    if number < 256:
        forms.append(rf"\\{{1,8}}x{number:02x}")
    if char in _QUOTED:
        forms.append(_QUOTED[char])
    if char in _ENTITIES:
        forms.append(f"&{_ENTITIES[char]};")
    return f"(?:{'|'.join(forms)})"


def _base64_of(data: bytes) -> Iterator[str]:
    """Yield what all base64 has in which the bytes occur, at each of the three offsets."""
    for offset, first in enumerate((0, 2, 3)):
        coded = base64.b64encode(bytes(offset) + data).decode()
        # Without the characters that depend on what stands around.
        core = coded[first : (offset + len(data)) * 8 // 6]
        if len(core) >= _SHORTEST_CODED:
            yield "".join(_BASE64.get(char, char) for char in core)


def _widened(text: str, start: int, end: int) -> Span:
    while start and _AROUND_BASE64.match(text[start - 1]):
        start -= 1
    while match := _AROUND_BASE64.match(text, end):
        end = match.end()
    return start, end


def masked_at(text: str, spans: Iterable[Span]) -> str:
    """Return a text with one mask in place of all spans that overlap or touch."""
    pieces: list[str] = []
    done = 0
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if start > done or not pieces:
            pieces += [text[done:start], MASK]
        done = max(done, end)
    return "".join([*pieces, text[done:]])
