"""Every path that some server may take one raw path for. Pure; knows no routes.

Servers differ in what they do before they choose a handler: decode escapes (all, all but `%2F`, or twice), take `\\`
for `/`, merge `//`, take `//name` for a host, drop `;params`, resolve `.` and `..`, cut at a decoded `?` or `#`, drop
a trailing slash, repair or normalise what is not ASCII. They do so in any order, and a chain of them does all of it, so
`readings` applies every such step to every result of another until nothing new comes up. Letter case is not among
them: who compares readings compares them folded as well (`folded`).

Not among them either, because refusing them would refuse ordinary names: suffixes taken for formats (`/x.json` read as
`/x`), and trailing dots or spaces that some file systems ignore.
"""

import re
import unicodedata
from urllib.parse import unquote_to_bytes

from gateway.errors import AmbiguousPath

#: Of one path. A path that can be read in more ways was made to be.
READINGS_MAX = 128
#: Of all readings of one path together, so that a long path cannot buy much work.
READ_BYTES_MAX = 131_072

_MALFORMED_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ESCAPE_BUT_SLASHES = re.compile(rb"%(?!2[Ff]|5[Cc])([0-9A-Fa-f]{2})")
#: RFC 3986 §2.3: `-`, `.`, digits, letters, `_` and `~` mean the same escaped or not, so normalisers unescape them.
_NEEDLESS_ESCAPE = re.compile(rb"%(2[DdEe]|3[0-9]|[46][1-9A-Fa-f]|[57][0-9Aa]|5[Ff]|7[Ee])")
_SLASHES = re.compile(rb"/{2,}")
_AUTHORITY = re.compile(rb"//+[^/]*")
_PARAMS = re.compile(rb";[^/]*")
_CUT = re.compile(rb"[?#].*", re.DOTALL)
_CONTROLS = bytes(range(0x20)) + b"\x7f"

_CLIMBS = "The path leads above its root."
_CONTROL = "The path holds a control character."
_MALFORMED = "The path holds a malformed percent escape."
_ENDLESS = "The path can be read in too many ways."


def decoded(path: bytes) -> bytes:
    """The canonical form: every escape decoded, once. Raises AmbiguousPath for an escape that is none.

    A malformed escape means itself to some, nothing to others, and half of it or an error to the rest: there is no
    list of its readings that is complete.
    """
    if _MALFORMED_ESCAPE.search(path):
        raise AmbiguousPath(_MALFORMED)
    return unquote_to_bytes(path)


def readings(path: bytes) -> set[bytes]:
    """`path` and everything else that it may be read as. path: absolute, raw, without a query.

    Raises AmbiguousPath when any reading climbs above the root, where the prefix of an upstream's URL ends, or holds
    a control character; or when there are more than READINGS_MAX or READ_BYTES_MAX of them.
    """
    found = {path}
    left_bytes = READ_BYTES_MAX - len(path)
    unread = [path]
    while unread:
        reading = unread.pop()
        if len(reading.translate(None, _CONTROLS)) != len(reading):
            raise AmbiguousPath(_CONTROL)
        for other in _steps(reading):
            if other not in found:
                found.add(other)
                unread.append(other)
                left_bytes -= len(other)
                if left_bytes < 0 or len(found) > READINGS_MAX:
                    raise AmbiguousPath(_ENDLESS)
    return found


def folded(path: bytes) -> bytes:
    """`path` as servers see it that do not tell upper from lower case, of any alphabet."""
    if path.isascii():
        return path.lower()
    # Upper first: a dotless i, or a long s, becomes an ordinary letter on one of the two ways only.
    text = path.decode("utf-8", "surrogateescape").upper().casefold()
    return text.encode("utf-8", "surrogateescape")


def _steps(path: bytes) -> list[bytes]:
    """What each single step makes of `path`."""
    steps = [_dropped_slash(path)]
    if b"%" in path:
        steps += (unquote_to_bytes(path), _ESCAPE_BUT_SLASHES.sub(_unescaped, path))
    if b"\\" in path:
        steps.append(path.replace(b"\\", b"/"))
    if b"//" in path:
        steps.append(_SLASHES.sub(b"/", path))
        if path.startswith(b"//"):
            steps.append(_AUTHORITY.sub(b"", path, count=1) or b"/")
    if b";" in path:
        steps.append(_PARAMS.sub(b"", path))
    if b"/." in path:
        steps.append(_resolved(path))
    if b"?" in path or b"#" in path:
        steps.append(_CUT.sub(b"", path))
    if not path.isascii():
        steps += _in_ascii(path)
    return steps


def _unescaped(escape: re.Match[bytes]) -> bytes:
    return bytes.fromhex(escape[1].decode("ascii"))


def _dropped_slash(path: bytes) -> bytes:
    return path[:-1] if len(path) > 1 and path.endswith(b"/") else path


def _resolved(path: bytes) -> bytes:
    """Without dot segments (RFC 3986 §5.2.4), but that what climbs above the root is refused."""
    kept: list[bytes] = []
    segment = b""
    for segment in path.split(b"/")[1:]:
        if segment == b"..":
            if not kept:
                raise AmbiguousPath(_CLIMBS)
            kept.pop()
        elif segment != b".":
            kept.append(segment)
    if segment in (b".", b".."):
        kept.append(b"")
    return b"/" + b"/".join(kept)


def _in_ascii(path: bytes) -> list[bytes]:
    """What becomes of bytes that are not ASCII: compatibility forms of ASCII; and, where they are no UTF-8, nothing,
    or whatever a decoder makes of them that does not check what it decodes (overlong forms, swallowed neighbours)."""
    try:
        text = path.decode()
    except UnicodeDecodeError:
        return [path.decode("utf-8", "ignore").encode(), _decoded_unchecked(path)]
    return [unicodedata.normalize("NFKC", text).encode()]


def _decoded_unchecked(path: bytes) -> bytes:
    text = []
    position = 0
    while position < len(path):
        lead = path[position]
        extra = 0 if lead < 0xC0 else 1 if lead < 0xE0 else 2 if lead < 0xF0 else 3
        point = lead & (0x3F >> extra) if extra else lead
        rest = path[position + 1 : position + 1 + extra]
        for byte in rest:
            point = point << 6 | byte & 0x3F
        is_text = len(rest) == extra and (point < 0xD800 or 0xE000 <= point < 0x110000)
        text.append(chr(point) if is_text else "\ufffd")
        position += 1 + extra
    return "".join(text).encode()
