"""What a request's head says, and the ids that requests are known by."""

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gateway import headers
from gateway.downstream.head import EXTENSION, Head
from gateway.headers import Network
from gateway.types import Facts, HeaderList

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def read_facts(scope: Mapping[str, Any], fresh_id: str, trusted_proxies: Sequence[Network]) -> Facts:
    """What the request's head says. The request id is the client's only where a trusted proxy vouches for it."""
    named: HeaderList = tuple(scope["headers"])
    peer = scope.get("client")
    peer_ip = peer[0] if peer else ""
    head: Head | None = scope.get("extensions", {}).get(EXTENSION)
    facts = Facts(
        request_id=fresh_id,
        method=scope["method"],
        path=scope["path"],
        target=_target(scope) if head is None else head.target,
        headers=named,
        client_ip=headers.client_ip(peer_ip, named, trusted_proxies),
        peer_ip=peer_ip,
        fields=() if head is None else head.fields,
        scheme=scope.get("scheme", "http"),
        http_version=scope["http_version"],
    )
    if headers.is_trusted(peer_ip, trusted_proxies):
        given = facts.header(b"x-request-id")
        if given is not None and REQUEST_ID.fullmatch(given):
            return replace(facts, request_id=given)
    return facts


def _target(scope: Mapping[str, Any]) -> bytes:
    """Nearly the request line's: ASGI cannot tell an empty query from none."""
    path: bytes = scope["raw_path"]
    query: bytes = scope["query_string"]
    return path + b"?" + query if query else path


def fresh_id() -> str:
    """A UUIDv7 (RFC 9562 §5.7) as 32 hex digits: unique, and ordered by time in logs and indexes."""
    random_bits = int.from_bytes(os.urandom(10), "big")
    high = (time.time_ns() // 1_000_000) << 16 | 0x7000 | random_bits >> 68
    low = 0b10 << 62 | random_bits & (1 << 62) - 1
    return f"{high << 64 | low:032x}"
