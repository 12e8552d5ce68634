"""Differences towards the client, in the order they are applied in."""

from collections.abc import Sequence
from dataclasses import replace

from tests.walk.wire.both_ways import trailer_fields, version, via, without_connection_fields
from tests.walk.wire.exchange import Difference, Exchange, closes, cut_up, has_chunks, request_id_of, session_of, spaced
from tests.walk.wire.messages import Message, chunks_of, name_of


def _interim_to_1_0(message: Message, exchange: Exchange) -> Message | None:
    return None if message.is_interim and exchange.request.is_http_1_0 else message


def _answer_session(message: Message, exchange: Exchange) -> Message:
    session_id = session_of(exchange)
    if message.is_interim or session_id is None:
        return message
    return message.keeping(lambda name: name != b"x-session-id").adding(b"x-session-id: " + session_id)


def _answer_id(message: Message, exchange: Exchange) -> Message:
    if message.is_interim:
        return message
    name = b"x-gateway-request-id" if message.values(b"x-request-id") else b"x-request-id"
    return message.adding(name + b": " + request_id_of(exchange))


def _max_tokens(message: Message, exchange: Exchange) -> Message:
    most = exchange.setting.most_tokens
    return message if message.is_interim or most is None else message.adding(b"x-gateway-max-tokens: %d" % most)


def _limits(message: Message, exchange: Exchange) -> Message:
    if message.is_interim or not exchange.setting.limit_fields:
        return message
    # Whose fields the upstream has some of keeps them to itself.
    named = {name_of(line) for line in message.lines} - {b"x-ratelimit-warning"}
    theirs = tuple(start for start in (b"ratelimit", b"x-ratelimit-") if any(name.startswith(start) for name in named))
    return message.adding(*(line for line in limit_lines(exchange) if not name_of(line).startswith(theirs)))


def _limit_warning(message: Message, exchange: Exchange) -> Message:
    setting = exchange.setting
    if message.is_interim or not setting.limit_fields or setting.buffered or message.values(b"x-ratelimit-warning"):
        return message
    return message.adding(b"x-ratelimit-warning: rate;used=0.25")


def limit_lines(exchange: Exchange) -> list[bytes]:
    """What the limits of gateways.py come to. All of them are full again before the next request, so the figures are
    always those of one request alone; and there are some in shadow, of which nothing is to be seen."""
    setting = exchange.setting
    if not setting.buffered:
        lines = [
            b'ratelimit-policy: "credits";q=100;qu="credits";w=1, "rate";q=4;w=1',
            b'ratelimit: "rate";r=3;t=1, "credits";r=99;t=1',
        ]
        unit, most, left = b"requests", 4, 3
    else:
        # Reserved: a token for every four bytes, and 1024 for the answer.
        unit, most = b"tokens", 1_000_000_000
        request = exchange.request
        content = chunks_of(request.body).content if request.is_chunked else request.body
        left = most + -len(content) // 4 - 1_024
        lines = [
            b'ratelimit-policy: "tokens";q=%d;qu="tokens";w=1' % most,
            b'ratelimit: "tokens";r=%d;t=1' % left,
        ]
    if setting.dialect == "openai":
        lines += [
            b"x-ratelimit-limit-%b: %d" % (unit, most),
            b"x-ratelimit-remaining-%b: %d" % (unit, left),
            b"x-ratelimit-reset-%b: 1ms" % unit,
        ]
    return lines


def _unchunked_for_1_0(message: Message, exchange: Exchange) -> Message:
    if not (message.is_chunked and exchange.request.is_http_1_0):
        return message
    kept = message.keeping(lambda name: name != b"transfer-encoding")
    return replace(kept, body=chunks_of(message.body).content if message.body else b"")


def _answer_spacing(message: Message, exchange: Exchange) -> Message:
    return spaced(message, lambda value: value.lstrip(b" \t"), exchange)


def _status_line(message: Message, exchange: Exchange) -> Message:
    return message if len(message.start) > 12 else replace(message, start=message.start + b" ")


def _coding_without_a_body(message: Message, exchange: Exchange) -> Message:
    if message.is_chunked and not message.body:
        return message.keeping(lambda name: name != b"transfer-encoding")
    return message


def _chunk_spelling(message: Message, exchange: Exchange) -> Message:
    if not has_chunks(message, exchange):
        return message
    body = chunks_of(message.body)
    chunks = tuple((b"%x" % len(data), extension, data) for _, extension, data in body.chunks)
    _, semicolon, extension = body.last.partition(b";")
    return replace(message, body=replace(body, chunks=chunks, last=b"0" + semicolon + extension).raw)


def _chunk_extensions(message: Message, exchange: Exchange) -> Message:
    if not has_chunks(message, exchange):
        return message
    body = chunks_of(message.body)
    chunks = tuple((size, b"", data) for size, _, data in body.chunks)
    return replace(message, body=replace(body, chunks=chunks, last=body.last.partition(b";")[0]).raw)


def _chunk_parts(message: Message, exchange: Exchange) -> Message:
    if not (exchange.in_parts and has_chunks(message, exchange)):
        return message
    body = chunks_of(message.body)
    ends = _ends([len(data) for _, _, data in body.chunks])
    made = exchange.learned.answer_chunks
    # A chunk may become several; several never become one.
    assert set(ends) <= set(_ends(made)), f"chunks that end at {ends} were cut at {_ends(made)}"
    return replace(message, body=cut_up(body.content, made, body.trailers))


def _close_delimited(message: Message, exchange: Exchange) -> Message:
    framed = message.values(b"content-length") or message.values(b"transfer-encoding")
    empty = message.is_interim or message.status in (204, 304) or exchange.request.method == b"HEAD"
    if framed or empty or exchange.request.is_http_1_0:
        return message
    sizes = exchange.learned.answer_chunks if exchange.in_parts else (len(message.body),) * bool(message.body)
    return replace(message.adding(b"Transfer-Encoding: chunked"), body=cut_up(message.body, sizes, ()))


def _says_close(message: Message, exchange: Exchange) -> Message:
    request = exchange.request
    # What an early answer ends is not known when its head leaves, unless it refuses or never asked for the body.
    unforeseen = exchange.early and not request.values(b"expect") and message.body and message.status < 400
    if message.is_interim or unforeseen or not closes(request, exchange.early):
        return message
    return message.adding(b"Connection: close")


def _ends(sizes: Sequence[int]) -> list[int]:
    ends, total = [], 0
    for size in sizes:
        total += size
        ends.append(total)
    return ends


TO_CLIENT = (
    Difference("interim-to-http-1.0", "answer", _interim_to_1_0),
    Difference("answer-connection-fields", "answer", without_connection_fields),
    Difference("answer-field-spacing", "answer", _answer_spacing),
    Difference("status-line-space", "answer", _status_line),
    Difference("coding-without-a-body", "answer", _coding_without_a_body),
    Difference("request-id", "answer", _answer_id),
    Difference("session-id", "answer", _answer_session),
    Difference("answer-via", "answer", via),
    Difference("max-tokens-named", "answer", _max_tokens),
    Difference("limits", "answer", _limits),
    Difference("limit-warning", "answer", _limit_warning),
    Difference("answer-version", "answer", version),
    Difference("chunks-to-http-1.0", "answer", _unchunked_for_1_0),
    Difference("answer-trailers", "answer", trailer_fields),
    Difference("chunk-spelling", "answer", _chunk_spelling),
    Difference("chunk-extensions", "answer", _chunk_extensions),
    Difference("chunk-in-parts", "answer", _chunk_parts),
    Difference("close-delimited", "answer", _close_delimited),
    Difference("connection-close", "answer", _says_close),
)
