"""Which fields cross the gateway. Everything does as it came: order, place, duplicates and spelling kept. Not so

- hop-by-hop fields: they describe one connection, and ours is another one;
- fields that `Connection` nominates, unless they are meant for the recipient (END_TO_END);
- towards the upstream, inbound copies of every field the gateway itself attaches, also when spelled with underscores,
  which many frameworks take for hyphens: whoever sends them forges them;
- towards the upstream, what proxies say about the client: `forwarded` keeps it from trusted peers only.

Some hop-by-hop fields come back at their own place, because they are true of our connection too: `Transfer-Encoding`
where a body stays chunked, `Connection` and `Upgrade` of a handshake that the walk let pass, and `TE: trailers`. RFC
9110 §10.1.4 lets an intermediary say that on behalf of its client, as we hand trailers on; other codings named there we
could not undo. A client that does not nominate `TE`, as it must, has not said it.

`Expect: 100-continue` crosses, for we answer 100 only when the upstream does. Any other expectation does not: some
servers then read a body as the next request. `Trailer` crosses, and `Host` unless the caller strips it.
"""

from collections.abc import Iterable, Sequence

from gateway.headers.names import (
    ATTACHED,
    ATTACHED_PREFIX,
    END_TO_END,
    FORWARDED,
    FORWARDED_PREFIX,
    HOP_BY_HOP,
    NOT_IN_TRAILERS,
)
from gateway.types import HeaderList

Field = tuple[bytes, bytes]

_NOTHING: frozenset[bytes] = frozenset()
_NOT_AS_SENT = HOP_BY_HOP | ATTACHED | FORWARDED | {b"expect"}
_PREFIXES = (ATTACHED_PREFIX, FORWARDED_PREFIX)
#: What tells nearly every other name apart at once.
_STARTS = frozenset(prefix[:3] for prefix in _PREFIXES)
#: Framing has no other spelling either.
_NOT_IN_DISGUISE = _NOT_AS_SENT | {b"content-length"}
#: Nominating these changes nothing: they never cross, or always do. `close` is an option, not a field.
_NEVER_NOMINATED = END_TO_END | HOP_BY_HOP | {b"close", b""}
#: Values of Connection that nominate nothing, as nearly all do.
_PLAIN_CONNECTION = frozenset({b"keep-alive", b"close"})


def to_upstream(
    headers: HeaderList,
    fields: HeaderList = (),
    *,
    strip: frozenset[bytes],
    add: Sequence[Field],
    chunked: bool = False,
    upgrade: bytes = b"",
) -> list[Field]:
    """The request fields the upstream gets: those that cross, without `strip`, then `add`.

    headers: names in lower case. fields: the same with their names as on the wire; without it, those of `headers` go
    out. strip: further names, in lower case and with hyphens: the credential, the configured session and identity
    fields. add: as they are to stand, after everything else. chunked: the body goes out in chunks. upgrade: the
    protocol (`websocket`) of a handshake that may pass.
    """
    kept: list[Field] = []
    options: list[bytes] = []
    hops: list[tuple[int, Field]] = []
    once: set[bytes] = set()
    for (name, value), field in zip(headers, fields or headers, strict=True):
        if name in _NOT_AS_SENT:
            if name == b"connection" and value.lower() not in _PLAIN_CONNECTION:
                options += [option.strip(b" \t") for option in value.split(b",")]
            if name not in once:
                once.add(name)
                if name in (b"connection", b"te", b"upgrade"):
                    hops.append((len(kept), field))
                elif name == b"expect":
                    if value.lower() == b"100-continue" and name not in strip:
                        kept.append(field)
                elif chunked and name == b"transfer-encoding" and value.lower() == b"chunked":
                    kept.append(field)
        elif (
            name in strip
            or (name[:3] in _STARTS and name.startswith(_PREFIXES))
            or (b"_" in name and _in_disguise(name, strip))
        ):
            continue
        else:
            kept.append(field)
    if options:
        _put_back(kept, hops, options, upgrade)
        kept = _without_nominated(kept, options)
    kept.extend(add)
    return kept


def to_client(
    headers: Iterable[Field],
    add: Sequence[Field] = (),
    *,
    strip: frozenset[bytes] = _NOTHING,
    chunked: bool = False,
    upgrade: bool = False,
) -> list[Field]:
    """The response fields the client gets: those that cross, without `strip`, then `add`.

    headers: names in any case, kept as they are. strip: names in lower case, for fields that must not stand twice.
    chunked: the answer's body stays chunked. upgrade: the answer is a 101, whose Connection and Upgrade are made anew.
    """
    kept: list[Field] = []
    options: list[bytes] = []
    hops: list[tuple[int, Field]] = []
    has_coding = False
    for field in headers:
        name = field[0].lower()
        if name in HOP_BY_HOP:
            if name == b"connection":
                if field[1].lower() not in _PLAIN_CONNECTION:
                    options += [option.strip(b" \t") for option in field[1].split(b",")]
                    hops.append((len(kept), field))
            elif name == b"upgrade":
                hops.append((len(kept), field))
            elif name == b"transfer-encoding":
                if chunked and not has_coding and field[1].lower() == b"chunked":
                    kept.append(field)
                has_coding = True
        elif name not in strip:
            kept.append(field)
    if has_coding:
        # RFC 9112 §6.3: the coding overrules a length beside it, and who forwards removes that.
        kept = [field for field in kept if field[0].lower() != b"content-length"]
    elif upgrade:
        _put_back(kept, hops, options, b", ".join(field[1] for _, field in hops if field[0].lower() == b"upgrade"))
    if options:
        kept = _without_nominated(kept, options)
    kept.extend(add)
    return kept


def trailers(fields: Iterable[Field], strip: frozenset[bytes] = _NOTHING) -> list[Field]:
    """The trailer fields that cross, in either direction, as they are: names on the wire.

    strip: further names, in lower case and with hyphens, as for the header: a forged or secret field is no better for
    standing behind a body.
    """
    return [field for field in fields if _may_trail(field[0].lower().replace(b"_", b"-"), strip)]


def _may_trail(name: bytes, strip: frozenset[bytes]) -> bool:
    return name not in NOT_IN_TRAILERS and name not in strip and not name.startswith((*_PREFIXES, b"content-"))


def _put_back(kept: list[Field], hops: Sequence[tuple[int, Field]], options: Sequence[bytes], upgrade: bytes) -> None:
    """Those of `hops` that hold for our connection too stand in `kept` at the place they had."""
    said = {option.lower() for option in options}
    renewed: dict[bytes, bytes] = {}
    for _, (name, value) in hops:
        lower = name.lower()
        if lower == b"te" and b"te" in said and b"trailers" in [coding.strip() for coding in value.lower().split(b",")]:
            renewed[lower] = b"trailers"
        elif lower == b"upgrade" and b"upgrade" in said and upgrade:
            renewed[lower] = value if value.lower() == upgrade.lower() else upgrade
    if not renewed:
        return
    wanted = [option for option in options if option.lower() in renewed]
    renewed[b"connection"] = b", ".join({option.lower(): option for option in wanted}.values())
    placed = []
    for place, (name, _) in hops:
        given = renewed.pop(name.lower(), None)
        if given is not None:
            placed.append((place, (name, given)))
    for place, field in reversed(placed):
        kept.insert(place, field)


def _without_nominated(kept: list[Field], options: Sequence[bytes]) -> list[Field]:
    nominated = {option.lower() for option in options} - _NEVER_NOMINATED
    return [field for field in kept if field[0].lower() not in nominated] if nominated else kept


def _in_disguise(name: bytes, strip: frozenset[bytes]) -> bool:
    """`x_org_id`, `x-org_id`: read as `x-org-id` by frameworks that turn field names into variables."""
    meant = name.replace(b"_", b"-")
    return meant in _NOT_IN_DISGUISE or meant in strip or meant.startswith(_PREFIXES)
