"""What crosses the gateway in each direction, and why.

Everything crosses as it came: order, duplicates and spelling kept. Not so, towards the upstream:

- hop-by-hop fields (RFC 9110 §7.6.1): they describe one connection, and ours to the upstream is another one;
- fields that `Connection` nominates, unless they are meant for the recipient: see END_TO_END;
- `Expect`: the server at our door has answered it already (RFC 9110 §10.1.1);
- inbound copies of every field the gateway itself attaches, also when spelled with underscores, which many
  frameworks take for hyphens: whoever sends them forges them;
- what proxies say about the client (FORWARDED): rewritten by `forwarded`, which keeps it from trusted peers only.

`Trailer` crosses: §7.6.1 does not list it. `Host` crosses unless the caller strips it.
"""

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from gateway.types import HeaderList

Field = tuple[bytes, bytes]
Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authentication-info",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"transfer-encoding",
        b"upgrade",
    }
)

#: Fields the gateway attaches; whatever begins with ATTACHED_PREFIX belongs to them.
ATTACHED = frozenset(
    {
        b"x-session-id",
        b"x-session-turn",
        b"x-session-new",
        b"x-session-context",
        b"x-session-signature",
        b"x-session-status",
        b"x-org-id",
        b"x-user-id",
        b"x-plan",
        b"x-request-id",
    }
)
ATTACHED_PREFIX = b"x-gateway-"

#: What proxies before us say about the client.
FORWARDED = frozenset(
    {
        b"forwarded",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-forwarded-prefix",
        b"x-forwarded-proto",
        b"x-real-ip",
    }
)

#: Never removed on the word of `Connection`. RFC 9110 §7.6.1 forbids senders to nominate such fields; one who does
#: wants us to drop a credential, a cache rule or the framing that the next recipient relies on.
END_TO_END = frozenset(
    {
        b"accept",
        b"accept-encoding",
        b"anthropic-version",
        b"api-key",
        b"authorization",
        b"cache-control",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"cookie",
        b"date",
        b"etag",
        b"host",
        b"idempotency-key",
        b"location",
        b"retry-after",
        b"set-cookie",
        b"traceparent",
        b"tracestate",
        b"vary",
        b"www-authenticate",
        b"x-api-key",
        b"x-should-retry",
        *ATTACHED,
        *FORWARDED,
    }
)

#: The most hops of X-Forwarded-For that are looked at.
HOPS_MAX = 32

_NOT_TO_UPSTREAM = HOP_BY_HOP | ATTACHED | FORWARDED | {b"expect"}
#: Nominating these changes nothing: they never cross, or always do. `close` is an option, not a field.
_NEVER_NOMINATED = END_TO_END | HOP_BY_HOP | {b"close", b""}
_PREFIX_BYTES = len(ATTACHED_PREFIX)


def to_upstream(headers: HeaderList, *, strip: frozenset[bytes], add: Sequence[Field]) -> list[Field]:
    """The request fields the upstream gets: `headers` without what must not cross and without `strip`, then `add`.

    headers: names in lower case, as ASGI gives them. strip: further names, in lower case and with hyphens: the
    credential, the configured session and identity fields. add: as they are to stand, after everything else.
    """
    kept = []
    nominated: set[bytes] = set()
    for field in headers:
        name = field[0]
        if name in _NOT_TO_UPSTREAM:
            if name == b"connection":
                nominated |= _nominated(field[1])
        elif name in strip or name[:_PREFIX_BYTES] == ATTACHED_PREFIX or (b"_" in name and _in_disguise(name, strip)):
            continue
        else:
            kept.append(field)
    if nominated:
        kept = [field for field in kept if field[0] not in nominated]
    kept.extend(add)
    return kept


def to_client(
    headers: Iterable[Field], add: Sequence[Field] = (), *, strip: frozenset[bytes] = frozenset()
) -> list[Field]:
    """The response fields the client gets: `headers` without hop-by-hop fields and without `strip`, then `add`.

    headers: names in any case, kept as they are. strip: names in lower case, for fields that must not stand twice.
    """
    kept = []
    nominated: set[bytes] = set()
    for field in headers:
        name = field[0].lower()
        if name in HOP_BY_HOP:
            if name == b"connection":
                nominated |= _nominated(field[1])
        elif name not in strip:
            kept.append(field)
    if nominated:
        kept = [field for field in kept if field[0].lower() not in nominated]
    kept.extend(add)
    return kept


def forwarded(headers: HeaderList, peer_ip: str, scheme: str, host: str, trusted: bool) -> list[Field]:
    """What to `add` about the client: the FORWARDED fields a trusted peer sent, continued; else our own word alone.

    The peer joins the end of X-Forwarded-For, in one line. X-Forwarded-Proto and -Host are those the client used at
    the outermost trusted proxy, else `scheme` and `host`. An empty peer_ip (no IP socket) or host adds nothing.
    """
    hops = []
    fields = []
    said = set()
    for name, value in headers if trusted else ():
        if name == b"x-forwarded-for":
            if value:
                hops.append(value)
        elif name in FORWARDED:
            fields.append((name, value))
            said.add(name)
    if peer_ip:
        hops.append(peer_ip.encode("latin-1"))
    if hops:
        fields.append((b"x-forwarded-for", b", ".join(hops)))
    if b"x-forwarded-proto" not in said:
        fields.append((b"x-forwarded-proto", scheme.encode("latin-1")))
    if host and b"x-forwarded-host" not in said:
        fields.append((b"x-forwarded-host", host.encode("latin-1")))
    return fields


def is_trusted(peer_ip: str, trusted_networks: Sequence[Network]) -> bool:
    """Whether the socket's peer is one of our proxies, whose word on the client counts."""
    if not trusted_networks:
        return False
    peer = _address(peer_ip)
    return peer is not None and _within(peer, trusted_networks)


def client_ip(peer_ip: str, headers: HeaderList, trusted_networks: Sequence[Network]) -> str:
    """The client's address: the rightmost hop of X-Forwarded-For that is not a trusted proxy.

    Read from the right, because every hop to the left of an untrusted one is that one's invention. A malformed hop,
    or the HOPS_MAX-th, ends the reading at the last hop that was good. IPv4-mapped IPv6 becomes IPv4; a peer_ip that
    is no IP address is returned as it is.
    """
    if not trusted_networks and ":" not in peer_ip:
        return peer_ip  # the usual case of a gateway at the edge; nothing to read, nothing to normalise
    client = _address(peer_ip)
    if client is None:
        return peer_ip
    if _within(client, trusted_networks):
        lines = [value for name, value in headers if name == b"x-forwarded-for"]
        # Split from the right only: what is beyond the bound is not even cut.
        hops = b",".join(lines).rsplit(b",", HOPS_MAX)[-HOPS_MAX:] if lines else []
        for hop in reversed(hops):
            address = _hop_address(hop)
            if address is None:
                break
            client = address
            if not _within(client, trusted_networks):
                break
    return str(client)


def _nominated(value: bytes) -> set[bytes]:
    """The field names one Connection field value nominates and may."""
    names = {name.strip(b" \t") for name in value.lower().split(b",")}
    return names - _NEVER_NOMINATED


def _in_disguise(name: bytes, strip: frozenset[bytes]) -> bool:
    """`x_org_id`, `x-org_id`: read as `x-org-id` by frameworks that turn field names into variables."""
    meant = name.replace(b"_", b"-")
    return meant in _NOT_TO_UPSTREAM or meant in strip or meant.startswith(ATTACHED_PREFIX)


def _within(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)


def _hop_address(hop: bytes) -> Address | None:
    """One element of X-Forwarded-For: an address, with a port or brackets as some proxies write it."""
    text = hop.strip(b" \t").decode("latin-1")
    if text.startswith("["):
        text, bracket, port = text[1:].partition("]")
        if not bracket or (port and not _is_port(port)):
            return None
    elif text.count(":") == 1:
        text, _, port = text.partition(":")
        if not _is_port(":" + port):
            return None
    # A zone (RFC 4007) is free text with a meaning on one machine only: no address of a client.
    return None if "%" in text else _address(text)


def _is_port(text: str) -> bool:
    return text[:1] == ":" and text[1:].isascii() and text[1:].isdigit() and len(text) <= 6


def _address(text: str) -> Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
