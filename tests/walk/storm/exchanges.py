"""What the clients of a storm ask and what its upstream answers: each side can tell every byte that the other owes it.

A request says who it is three times: in its path, in a field, and all through its body. The answer repeats what the
upstream read in each of these places, so an answer that is not the asker's own, or was made of two requests, shows.
"""

import zlib
from dataclasses import dataclass

ID_CHARS = 16
#: Every body is JSON that a gateway which counts tokens can read.
_OPENING = b'{"model":"m","messages":[],"max_tokens":1,"pad":"'
_CLOSING = b'"}'
BODY_BYTES_MIN = len(_OPENING) + len(_CLOSING) + ID_CHARS + 1
STYLES = ("length", "chunked", "events")


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request wants for an answer; it says so in the field `X-Wish`."""

    #: Of the request itself, so that the upstream notices a shorter body under another framing.
    body_bytes: int
    style: str
    answer_bytes: int
    #: The answer's body is written in so many parts,
    parts: int
    #: with so much time before the head and between them.
    pause_ms: int

    def field(self) -> str:
        return f"{self.body_bytes} {self.style} {self.answer_bytes} {self.parts} {self.pause_ms}"

    @classmethod
    def read(cls, field: str) -> "Wish":
        body_bytes, style, answer_bytes, parts, pause_ms = field.split()
        return cls(int(body_bytes), style, int(answer_bytes), int(parts), int(pause_ms))


def pattern(id: str, size: int) -> bytes:
    """`size` bytes that say `id` again and again."""
    return (f"{id}." * (size // (len(id) + 1) + 1))[:size].encode()


def request_body(id: str, size: int) -> bytes:
    """size: 0, or at least BODY_BYTES_MIN."""
    if not size:
        return b""
    return _OPENING + pattern(id, size - len(_OPENING) - len(_CLOSING)) + _CLOSING


def id_in(body: bytes) -> str:
    """Who the body says it is; a dash for an empty one."""
    return body[len(_OPENING) : len(_OPENING) + ID_CHARS].decode("latin-1") if body else "-"


def answer_body(path_id: str, field_id: str, body: bytes, wish: Wish) -> bytes:
    """What the upstream read, and so much of `wish.answer_bytes` more."""
    told = f"{path_id} {field_id} {id_in(body)} {len(body)} {zlib.crc32(body)}\n".encode()
    return told + pattern(field_id, wish.answer_bytes)


def request(id: str, wish: Wish, *, path: str, secret: str, session: str, chunked: bool) -> bytes:
    """The bytes of one request. path: where requests of this kind go, up to the id at its end."""
    body = request_body(id, wish.body_bytes)
    fields = [
        ("Host", "gateway"),
        ("Authorization", f"Bearer {secret}"),
        ("X-Request-Id", id),
        ("X-Session-Id", session),
        ("X-Storm-Id", id),
        ("X-Wish", wish.field()),
    ]
    if chunked:
        fields.append(("Transfer-Encoding", "chunked"))
        half = len(body) // 2
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:half], body[half:]) if part)
        body += b"0\r\n\r\n"
    elif body:
        fields.append(("Content-Length", str(len(body))))
    head = "".join(f"{name}: {value}\r\n" for name, value in fields)
    return f"{'POST' if body else 'GET'} {path}{id} HTTP/1.1\r\n{head}\r\n".encode() + body
