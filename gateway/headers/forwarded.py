"""What the gateway says about a request's way to it: X-Forwarded-*, `Forwarded` (RFC 7239) and `Via`."""

import re

from gateway.headers.crossing import Field
from gateway.headers.names import FORWARDED, FORWARDED_PREFIX
from gateway.types import HeaderList

#: RFC 7239 §4: pairs whose values are tokens or quoted strings. Looser in what is quoted, strict in where quotes end.
_ELEMENTS = re.compile(rb'(?:[^"\\\x00-\x08\x0a-\x1f\x7f]|"(?:[^"\\]|\\.)*")*')
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def forwarded(headers: HeaderList, peer_ip: str, scheme: str, host: str, trusted: bool) -> list[Field]:
    """What to `add` about the client: the FORWARDED fields a trusted peer sent, continued; else our own word alone.

    The peer joins the end of X-Forwarded-For, in one line. X-Forwarded-Proto and -Host are those the client used at
    the outermost trusted proxy, else `scheme` and `host`. `Forwarded` is continued by an element of ours where the
    peer speaks it. An empty peer_ip (no IP socket) or host adds nothing.
    """
    hops = []
    elements = []
    fields = []
    said = set()
    for name, value in headers if trusted else ():
        if name == b"x-forwarded-for":
            if value:
                hops.append(value)
        elif name == b"forwarded":
            elements.append(value)
        elif name in FORWARDED or name.startswith(FORWARDED_PREFIX):
            fields.append((name, value))
            said.add(name)
    if peer_ip:
        hops.append(peer_ip.encode("latin-1"))
    if hops:
        fields.append((b"x-forwarded-for", b", ".join(hops)))
    if elements:
        fields.append((b"forwarded", _continued(elements, peer_ip, scheme, host)))
    if b"x-forwarded-proto" not in said:
        fields.append((b"x-forwarded-proto", scheme.encode("latin-1")))
    if host and b"x-forwarded-host" not in said:
        fields.append((b"x-forwarded-host", host.encode("latin-1")))
    return fields


def via(name: str, version: str) -> Field:
    """The field to `add` in either direction (RFC 9110 §7.6.3). version: of the message as it came in, `1.1`."""
    return b"Via", f"{version} {name}".encode("latin-1")


def _continued(elements: list[bytes], peer_ip: str, scheme: str, host: str) -> bytes:
    """One value of every element, ours last."""
    node = f"[{peer_ip}]" if ":" in peer_ip else peer_ip or "unknown"
    ours = b"for=" + _quoted(node.encode("latin-1")) + b";proto=" + _quoted(scheme.encode("latin-1"))
    if host:
        ours += b";host=" + _quoted(host.encode("latin-1"))
    # A quote that is left open would swallow our element, and with it what we know to be true.
    given = [value for value in elements if value and _ELEMENTS.fullmatch(value)]
    return b", ".join([*given, ours])


def _quoted(value: bytes) -> bytes:
    """A token as it is; anything else, such as IPv6 in brackets or a host with a port, as a quoted string."""
    if _TOKEN.fullmatch(value):
        return value
    return b'"' + value.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'
