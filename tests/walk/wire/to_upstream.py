"""Differences towards the upstream, in the order they are applied in."""

import base64
import hashlib
import hmac
import json
import re
from dataclasses import replace

from tests.walk.wire.both_ways import trailer_fields, version, via, without_connection_fields
from tests.walk.wire.exchange import Difference, Exchange, cut_up, has_chunks, request_id_of, session_of, spaced
from tests.walk.wire.messages import Message, chunks_of, name_of, value_of

#: What the gateway itself attaches.
FORGEABLE = re.compile(
    rb"x-(session-(id|turn|new|context|signature|status)|org-id|user-id|plan|request-id|gateway-.*)$"
)
#: What proxies say about the client.
ABOUT_THE_CLIENT = re.compile(rb"(forwarded|x-forwarded-.*|x-real-ip|x-original-url|x-rewrite-url)$")


def _empty_line(message: Message, exchange: Exchange) -> Message:
    return replace(message, before=b"")


def _without_forged_fields(message: Message, exchange: Exchange) -> Message:
    return message.keeping(lambda name: not FORGEABLE.match(name.replace(b"_", b"-")))


def _without_claims(message: Message, exchange: Exchange) -> Message:
    return message.keeping(lambda name: not ABOUT_THE_CLIENT.match(name.replace(b"_", b"-")))


def _without_credential(message: Message, exchange: Exchange) -> Message:
    setting = exchange.setting
    if setting.forward_credential:
        return message
    return replace(message, lines=tuple(line for line in message.lines if setting.key not in line))


def _host(message: Message, exchange: Exchange) -> Message:
    setting = exchange.setting
    if setting.host_is_clients:
        return message
    ours = b": " + setting.authority
    lines = tuple(line.partition(b":")[0] + ours if name_of(line) == b"host" else line for line in message.lines)
    if not message.values(b"host"):
        lines = (b"Host" + ours, *lines)
    return replace(message, lines=lines)


def _request_spacing(message: Message, exchange: Exchange) -> Message:
    return spaced(message, lambda value: value.strip(b" \t"), exchange)


def _expect(message: Message, exchange: Exchange) -> Message:
    if not (exchange.setting.buffered or exchange.in_one_packet):
        return message
    return message.keeping(lambda name: name != b"expect")


def _request_chunks(message: Message, exchange: Exchange) -> Message:
    if not has_chunks(message, exchange):
        return message
    body = chunks_of(message.body)
    return replace(message, body=cut_up(body.content, exchange.learned.request_chunks, body.trailers))


def _max_tokens(message: Message, exchange: Exchange) -> Message:
    most = exchange.setting.most_tokens
    if most is None:
        return message
    body = b'{"max_completion_tokens":%d,' % most + message.body.removeprefix(b"{")
    lines = (
        line.replace(b"%d" % len(message.body), b"%d" % len(body)) if name_of(line) == b"content-length" else line
        for line in message.lines
        if name_of(line) not in (b"content-md5", b"digest", b"content-digest", b"repr-digest")
    )
    return replace(message, lines=tuple(lines), body=body)


def _who_asks(message: Message, exchange: Exchange) -> Message:
    setting = exchange.setting
    return message.adding(
        b"x-request-id: " + request_id_of(exchange), b"x-org-id: " + setting.org, b"x-plan: " + setting.plan
    )


def _where_from(message: Message, exchange: Exchange) -> Message:
    request, trusted = exchange.request, exchange.setting.trusted
    hosts = request.values(b"host")
    said = [line for line in request.lines if trusted and ABOUT_THE_CLIENT.match(name_of(line))]
    kept = [
        name_of(line) + b": " + value_of(line)
        for line in said
        if name_of(line) not in (b"x-forwarded-for", b"forwarded")
    ]
    hops = [value_of(line) for line in said if name_of(line) == b"x-forwarded-for"]
    kept.append(b"x-forwarded-for: " + b", ".join((*hops, b"127.0.0.1")))
    if elements := [value_of(line) for line in said if name_of(line) == b"forwarded"]:
        ours = b"for=127.0.0.1;proto=http" + b"".join(b";host=" + host for host in hosts)
        kept.append(b"forwarded: " + b", ".join((*elements, ours)))
    names = {name_of(line) for line in said}
    if b"x-forwarded-proto" not in names:
        kept.append(b"x-forwarded-proto: http")
    if hosts and b"x-forwarded-host" not in names:
        kept.append(b"x-forwarded-host: " + hosts[0])
    return message.adding(*kept)


def _user(message: Message, exchange: Exchange) -> Message:
    user = exchange.setting.user
    return message if user is None else message.adding(b"x-user-id: " + user)


def _session(message: Message, exchange: Exchange) -> Message:
    session_id = session_of(exchange)
    if session_id is None:
        return message
    context = context_of(exchange, session_id)
    return message.adding(
        b"x-session-id: " + session_id,
        b"x-session-turn: 1",
        b"x-session-new: true",
        b"x-session-context: " + context,
    )


def _signature(message: Message, exchange: Exchange) -> Message:
    setting, learned, session_id = exchange.setting, exchange.learned, session_of(exchange)
    if not setting.signing_key or session_id is None:
        return message
    signed = b"|".join(
        (
            b"%d" % learned.signed_s,
            exchange.request.method,
            exchange.request.target,
            request_id_of(exchange),
            setting.org,
            session_id,
            context_of(exchange, session_id),
        )
    )
    signature = hmac.new(setting.signing_key, signed, hashlib.sha256).hexdigest().encode()
    return message.adding(b"x-session-signature: v1;t=%d;sig=%b" % (learned.signed_s, signature))


def context_of(exchange: Exchange, session_id: bytes) -> bytes:
    setting = exchange.setting
    context = {
        "v": 1,
        "session_id": session_id.decode(),
        "org_id": setting.org.decode(),
        "user_id": None if setting.user is None else setting.user.decode(),
        "plan": setting.plan.decode(),
        "turn": 1,
        "new": True,
        "created_ms": exchange.learned.created_ms,
        "total_tokens": 0,
        "last_model": None,
    }
    text = json.dumps(context, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=")


TO_UPSTREAM = (
    Difference("empty-line", "request", _empty_line),
    Difference("request-version", "request", version),
    Difference("request-connection-fields", "request", without_connection_fields),
    Difference("request-field-spacing", "request", _request_spacing),
    Difference("forged-fields", "request", _without_forged_fields),
    Difference("forwarded-claims", "request", _without_claims),
    Difference("credential", "request", _without_credential),
    Difference("expect-answered", "request", _expect),
    Difference("host", "request", _host),
    Difference("request-trailers", "request", trailer_fields),
    Difference("request-chunks", "request", _request_chunks),
    Difference("max-tokens", "request", _max_tokens),
    Difference("who-asks", "request", _who_asks),
    Difference("forwarded-fields", "request", _where_from),
    Difference("user", "request", _user),
    Difference("session", "request", _session),
    Difference("session-signature", "request", _signature),
    Difference("request-via", "request", via),
)
