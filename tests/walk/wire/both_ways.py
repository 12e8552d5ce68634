"""Differences in both directions: what describes one connection, and what proxies add."""

import re
from dataclasses import replace

from tests.walk.wire.exchange import Exchange, has_chunks
from tests.walk.wire.messages import Message, chunks_of, name_of, value_of

HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"http2-settings",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authentication-info",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"upgrade",
    )
)
#: Meant for the recipient, whatever `Connection` says of them; those that occur in the cases.
NEVER_NOMINATED = frozenset((b"authorization", b"content-type", b"cookie", b"host", b"x-api-key", b"content-length"))
#: RFC 9110 §6.5.1, and what the gateway attaches; those that occur in the cases.
NEVER_TRAILERS = re.compile(rb"(content-.*|x-org-id|x-request-id|x-session-id|authorization|set-cookie|retry-after)$")


def version(message: Message, exchange: Exchange) -> Message:
    if not message.is_http_1_0:
        return message
    start = message.start
    return replace(message, start=b"HTTP/1.1" + start[8:] if message.is_answer else start[:-8] + b"HTTP/1.1")


def without_connection_fields(message: Message, exchange: Exchange) -> Message:
    options = message.options(b"connection")
    nominated = set(options) - NEVER_NOMINATED - {b"transfer-encoding"}
    te = not message.is_answer and b"te" in options and b"trailers" in message.options(b"te")
    lines = []
    for line in message.lines:
        name = name_of(line)
        if te and name == b"te":
            # True of our connection too, because trailers are handed on.
            lines.append(line.partition(b":")[0] + b": trailers")
        elif te and name == b"connection":
            said = (option.strip() for option in value_of(line).split(b","))
            lines.append(line.partition(b":")[0] + b": " + next(option for option in said if option.lower() == b"te"))
        elif name not in HOP_BY_HOP and name not in nominated:
            lines.append(line)
    return replace(message, lines=tuple(lines))


def trailer_fields(message: Message, exchange: Exchange) -> Message:
    if not has_chunks(message, exchange):
        return message
    body = chunks_of(message.body)
    kept = tuple(line for line in body.trailers if not NEVER_TRAILERS.match(name_of(line).replace(b"_", b"-")))
    return replace(message, body=replace(body, trailers=kept).raw)


def via(message: Message, exchange: Exchange) -> Message:
    name = exchange.setting.via
    if not name or message.is_interim:
        return message
    received = message if message.is_answer else exchange.request
    spoken = b"1.0 " if received.is_http_1_0 else b"1.1 "
    return message.adding(b"Via: " + spoken + name)
