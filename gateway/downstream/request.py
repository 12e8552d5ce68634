"""A request's head as bytes, read strictly: one meaning, or a refusal. Pure; owns neither socket nor body.

What other servers might read in another way is refused rather than repaired (RFC 9112 §11.2): bare CR or LF, folded
lines, white space before a colon, control characters, lengths that repeat or stand beside a transfer coding. Targets
must be paths: RFC 9112 §3.2.2 lets servers take `http://host/path` too, but then the host is said twice, and whoever
is behind us may believe the other one; `*` and `host:port` name nothing that a route could serve. CONNECT, TRACE
(which would show an upstream's view of the credentials) and TRACK are not implemented.

A field value may hold every byte above 0x7f, and a target too: they cross as they are.
"""

import re
from typing import NamedTuple

from gateway.downstream.head import Head

Field = tuple[bytes, bytes]

#: As much as is ever kept of a head, from its first byte to the end of its empty line.
HEAD_BYTES_MAX = 65_536
#: Half of that: servers behind us take 8 to 32 KiB.
TARGET_BYTES_MAX = 32_768
#: What Apache and gunicorn take. Browsers behind three proxies send some forty.
FIELDS_MAX = 100
#: Twice the longest registered method.
METHOD_BYTES_MAX = 40
#: Trailers carry checksums and timings: one or two, not a second head.
TRAILERS_MAX = 32
TRAILERS_BYTES_MAX = 8_192

#: How an HTTP/2 client without TLS begins (RFC 9113 §3.4).
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\n"

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_TEXT = rb"[^\x00-\x08\x0a-\x1f\x7f]"
#: RFC 9112 §2.2: old clients end a body with an empty line that does not belong to it.
_LINE = re.compile(rb"(?:\r\n)?+(%b{1,%d}) (/[^\x00-\x20\x7f#]*+) HTTP/1\.([01])\r\n" % (_TOKEN, METHOD_BYTES_MAX))
#: From one line end to the next, and nothing between two of them that is not a field.
_FIELD = re.compile(rb"(?<=\n)(%b++):[ \t]*+(%b*+)\r\n" % (_TOKEN, _TEXT))
#: No head holds these anywhere.
_STRAY = re.compile(rb"(?<!\r)\n|[^\t\r\n\x20-\x7e\x80-\xff]|\r(?=[^\n])")
_METHOD = re.compile(rb"%b+" % _TOKEN)
_VERSION = re.compile(rb"HTTP/[0-9](?:\.[0-9])?")
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
#: 10^18 bytes are more than anybody sends, and fit every integer of whoever counts behind us.
_LENGTH_DIGITS_MAX = 18

_NOT_IMPLEMENTED = frozenset({b"CONNECT", b"TRACE", b"TRACK"})
#: Two of them would contradict each other, or be read as a list by some.
_ONCE = (b"content-length", b"expect", b"host", b"transfer-encoding")
_LISTS = (b"connection", b"upgrade")
#: Read as the fields with hyphens by servers that turn field names into variables: a second framing.
_DISGUISED = (b"content_length", b"transfer_encoding")
#: RFC 9110 §6.5.1: framing and routing are decided before a body is read, never behind it.
_NOT_IN_TRAILERS = frozenset(
    {*_ONCE, *_LISTS, *_DISGUISED, b"keep-alive", b"proxy-connection", b"te", b"trailer"},
)


class Unreadable(Exception):
    """What the client sends cannot be taken as a request; `status` and the message are its answer."""

    def __init__(self, status: int, says: str) -> None:
        super().__init__(says)
        self.status = status


class Request(NamedTuple):
    """Everything a head says."""

    head: Head
    method: str
    #: `1.1` or `1.0`.
    version: str
    #: Names in lower case.
    headers: list[Field]
    #: None when the body is chunked.
    body_bytes: int | None
    #: The connection may serve another request after this one.
    keep_alive: bool


def read_head(raw: bytes) -> Request:
    """raw: up to and including the empty line. Raises Unreadable."""
    line = _LINE.match(raw)
    if line is None:
        raise _line_trouble(raw)
    method, target, minor = line.groups()
    if method.upper() in _NOT_IMPLEMENTED:
        raise Unreadable(501, "This method is not implemented here.")
    if len(target) > TARGET_BYTES_MAX:
        raise _too_long_a_target()
    fields = _read_fields(raw, line.end(), FIELDS_MAX)
    headers = [(name.lower(), value) for name, value in fields]
    named = dict(headers)
    if len(named) != len(headers):
        _settle_repeated(named, headers)
    is_current = minor == b"1"
    body_bytes = _read_framing(named, is_current)
    upgrade, keep_alive = b"", is_current
    connection = named.get(b"connection")
    if connection is not None and is_current:
        options = [option.strip(b" \t") for option in connection.lower().split(b",")]
        if b"upgrade" in options:
            upgrade = named.get(b"upgrade", b"").lower()
        # After an upgrade that was not taken nobody knows for which protocol the client's next bytes are meant.
        keep_alive = not upgrade and b"close" not in options
    expects = named.get(b"expect")
    if expects is not None and expects.lower() != b"100-continue":
        raise Unreadable(417, "The only expectation that can be met here is `100-continue`.")
    waits = expects is not None and is_current and body_bytes != 0
    head = Head(tuple(fields), target, upgrade, waits)
    return Request(head, method.decode("ascii"), "1.1" if is_current else "1.0", headers, body_bytes, keep_alive)


def read_trailers(raw: bytes) -> list[Field]:
    """The fields behind a chunked body. raw: up to and including the empty line. Raises Unreadable."""
    fields = _read_fields(b"\n" + raw, 1, TRAILERS_MAX)
    if any(name.lower() in _NOT_IN_TRAILERS for name, _ in fields):
        raise Unreadable(400, "Fields that frame or route a request cannot be trailers.")
    return fields


def is_hopeless(begun: bytes | bytearray, known_bytes: int) -> bool:
    """No head can begin like this, so nobody need wait for its end. The first `known_bytes` were looked at before."""
    return _STRAY.search(begun, max(0, known_bytes - 1)) is not None


def _read_fields(raw: bytes, begin: int, count_max: int) -> list[Field]:
    """The fields from `begin`, right behind a line end, to the empty line that ends `raw`."""
    end = len(raw) - 2
    count = raw.count(b"\n", begin, end)
    if count > count_max:
        raise Unreadable(431, f"There are more than {count_max} fields.")
    fields: list[Field] = _FIELD.findall(raw, begin, end)
    # Each match ends with the only line feed in it, so as many matches as line feeds leave no room for anything else.
    if len(fields) != count:
        raise Unreadable(400, "A header field is not: a name, a colon, text without control characters, CR LF.")
    if b" \r\n" in raw or b"\t\r\n" in raw:
        return [(name, value.rstrip(b" \t")) for name, value in fields]
    return fields


def _read_framing(named: dict[bytes, bytes], is_current: bool) -> int | None:
    """The length of the body, None for a chunked one. Raises Unreadable."""
    host = named.get(b"host")
    if (is_current or host is not None) and not _HOST.fullmatch(host or b""):
        raise Unreadable(400, "The Host field is missing or names no host.")
    if b"content_length" in named or b"transfer_encoding" in named:
        raise Unreadable(400, "Names of framing fields are written with hyphens.")
    length, coding = named.get(b"content-length"), named.get(b"transfer-encoding")
    if coding is not None:
        if length is not None or not is_current:
            raise Unreadable(400, "Transfer-Encoding needs HTTP/1.1, and no Content-Length beside it.")
        if coding.lower() != b"chunked":
            raise Unreadable(501, "The only transfer coding that is understood here is `chunked`, alone.")
        return None
    if length is None:
        return 0
    if not length.isdigit() or len(length) > _LENGTH_DIGITS_MAX:
        raise Unreadable(400, "Content-Length is not a number.")
    if length[:1] == b"0" and len(length) > 1:
        raise Unreadable(400, "Content-Length begins with a zero, which some servers read as octal.")
    return int(length)


def _settle_repeated(named: dict[bytes, bytes], headers: list[Field]) -> None:
    """`named` holds the whole of every list; raises Unreadable when a field that stands once stands twice."""
    for name in _ONCE:
        if name in named and sum(name == other for other, _ in headers) > 1:
            raise Unreadable(400, f"The field {name.decode()} stands twice.")
    for name in _LISTS:
        if name in named:
            named[name] = b", ".join([value for other, value in headers if other == name])


def _line_trouble(raw: bytes) -> Unreadable:
    """Why the request line was not understood."""
    line = raw.removeprefix(b"\r\n").partition(b"\r\n")[0]
    words = line.split(b" ")
    if len(words) != 3 or _STRAY.search(line) or b"\t" in line:
        return Unreadable(400, "The request line is not: method, one space, target, one space, version.")
    method, target, version = words
    if not _METHOD.fullmatch(method):
        return Unreadable(400, "The method is not a token.")
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        if _VERSION.fullmatch(version):
            return Unreadable(505, "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
        return Unreadable(400, "The request line does not end with an HTTP version.")
    if len(method) > METHOD_BYTES_MAX or method.upper() in _NOT_IMPLEMENTED:
        return Unreadable(501, "This method is not implemented here.")
    if len(target) > TARGET_BYTES_MAX:
        return _too_long_a_target()
    return Unreadable(400, "The request target must be a path that begins with a slash, without a fragment.")


def _too_long_a_target() -> Unreadable:
    return Unreadable(414, f"The request target is longer than {TARGET_BYTES_MAX} bytes.")
