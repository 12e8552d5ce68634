"""What a difference is, and what it may look at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tests.walk.wire.messages import CRLF, Message, chunks_of


@dataclass(frozen=True, slots=True)
class Setting:
    """How the gateway of a dialogue is configured, and who its client is."""

    #: Host and port of the upstream, as its URL has them.
    authority: bytes
    org: bytes
    plan: bytes
    user: bytes | None
    signing_key: bytes = b""
    #: `sessions.mint`.
    mint: bool = True
    #: What the client is recognised by.
    key: bytes = b""
    #: `forward_credential` of the route.
    forward_credential: bool = False
    #: `upstreams.*.host` is `client`.
    host_is_clients: bool = False
    #: `listen.via`.
    via: bytes = b""
    #: The client is one of `listen.trusted_proxies`.
    trusted: bool = False
    #: A limit counts tokens, so that the body is read before it is forwarded.
    buffered: bool = False
    #: `dialect` of the route.
    dialect: str = "problem"
    #: `enforce_max_tokens: inject`, and what a request without a maximum is held to; None: off.
    most_tokens: int | None = None
    #: `limits.headers`.
    limit_fields: bool = True


@dataclass(frozen=True, slots=True)
class Learned:
    """What the gateway chose for one request."""

    request_id: bytes = b"0" * 32
    created_ms: int = 1
    signed_s: int = 1
    #: Sizes of the chunks of its own making.
    request_chunks: tuple[int, ...] = ()
    answer_chunks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a difference may look at beside the message itself."""

    setting: Setting
    learned: Learned
    #: As the client sent it.
    request: Message
    #: The request was answered before it was complete.
    early: bool
    #: The whole request came in one packet.
    in_one_packet: bool
    #: What arrives in parts may be passed on in parts: the dialogue sends it so, or it is larger than a read.
    in_parts: bool


Apply = Callable[[Message, Exchange], Message | None]


@dataclass(frozen=True, slots=True)
class Difference:
    """`name` is the one in docs/transparency.md. `apply` returns None for a message that does not cross."""

    name: str
    #: `request`: towards the upstream; `answer`: towards the client.
    direction: str
    apply: Apply


def closes(request: Message, early: bool) -> bool:
    """The client's connection ends with the answer: because the client wants it so, or is not heard out."""
    options = request.options(b"connection")
    return early or b"close" in options or b"upgrade" in options or request.is_http_1_0


def request_id_of(exchange: Exchange) -> bytes:
    """The gateway's own choice, or what a trusted proxy calls the request."""
    given = exchange.request.values(b"x-request-id")
    return given[0] if given and exchange.setting.trusted else exchange.learned.request_id


def session_of(exchange: Exchange) -> bytes | None:
    """The id the client named, or the one that was minted."""
    named = exchange.request.values(b"x-session-id")
    if named:
        return named[0]
    return b"ses_" + exchange.learned.request_id if exchange.setting.mint else None


def has_chunks(message: Message, exchange: Exchange) -> bool:
    """A whole chunked body is there."""
    return message.is_chunked and bool(message.body) and (message.is_answer or not exchange.early)


def spaced(message: Message, trimmed: Callable[[bytes], bytes], exchange: Exchange) -> Message:
    """One space behind each colon, in the trailers too."""

    def respaced(lines: Sequence[bytes]) -> tuple[bytes, ...]:
        return tuple(name + b": " + trimmed(value) for name, _, value in (line.partition(b":") for line in lines))

    message = replace(message, lines=respaced(message.lines))
    if not has_chunks(message, exchange):
        return message
    body = chunks_of(message.body)
    return replace(message, body=replace(body, trailers=respaced(body.trailers)).raw)


def cut_up(content: bytes, sizes: Sequence[int], trailers: Sequence[bytes]) -> bytes:
    """`content` in chunks of these sizes, as the gateway spells them."""
    assert sum(sizes) == len(content), f"{len(content)} bytes cannot be cut into {sizes}"
    pieces, at = [], 0
    for size in sizes:
        pieces.append(b"%x\r\n%b\r\n" % (size, content[at : at + size]))
        at += size
    return CRLF.join((b"".join(pieces) + b"0", *trailers, b"", b""))
