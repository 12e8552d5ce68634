"""What crosses: everything as it came, but for the few fields that must not."""

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.headers import (
    ATTACHED,
    END_TO_END,
    FORWARDED,
    HOP_BY_HOP,
    HOPS_MAX,
    NOT_IN_TRAILERS,
    Field,
    client_ip,
    forwarded,
    is_trusted,
    to_client,
    to_upstream,
    trailers,
    via,
)

NOTHING: frozenset[bytes] = frozenset()
PROXIES = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


def sent(*headers: Field, strip: frozenset[bytes] = NOTHING, add: tuple[Field, ...] = ()) -> list[Field]:
    return to_upstream(headers, strip=strip, add=add)


# Towards the upstream


def test_ordinary_fields_cross_in_order_with_their_duplicates() -> None:
    headers = ((b"host", b"api"), (b"accept", b"a"), (b"x-b", b"1"), (b"accept", b"b"), (b"content-length", b"3"))

    assert sent(*headers) == list(headers)


def test_added_fields_stand_at_the_end() -> None:
    assert sent((b"a", b"1"), add=((b"x-org-id", b"o"),)) == [(b"a", b"1"), (b"x-org-id", b"o")]


# Written out, so that a name lost from the code is missed here.
HOPS = """connection http2-settings keep-alive proxy-connection te transfer-encoding upgrade
    proxy-authenticate proxy-authentication-info proxy-authorization""".split()
OURS = """x-session-id x-session-turn x-session-new x-session-context x-session-signature
    x-org-id x-user-id x-plan x-request-id x-gateway-anything""".split()
OF_PROXIES = """forwarded x-forwarded-for x-forwarded-host x-forwarded-port x-forwarded-prefix x-forwarded-proto
    x-forwarded-user x-forwarded-client-cert x-real-ip x-original-url x-rewrite-url""".split()


@pytest.mark.parametrize("name", [name.encode() for name in [*HOPS, *OURS, *OF_PROXIES, "expect"]])
def test_field_never_crosses_and_comes_back_only_as_ours(name: bytes) -> None:
    assert sent((name, b"theirs"), (b"a", b"1"), add=((name, b"ours"),)) == [(b"a", b"1"), (name, b"ours")]


@pytest.mark.parametrize(
    "name",
    [b"x_org_id", b"x-org_id", b"x_gateway_user", b"transfer_encoding", b"content_length", b"x_api_key"]
    + [b"x_forwarded_user", b"x_original-url"],
)
def test_underscores_do_not_smuggle_a_forged_field(name: bytes) -> None:
    assert sent((name, b"forged"), strip=frozenset({b"x-api-key"})) == []


def test_an_innocent_field_with_underscores_crosses() -> None:
    assert sent((b"openai_beta", b"v2")) == [(b"openai_beta", b"v2")]


def test_the_credential_is_stripped_when_asked() -> None:
    headers = ((b"authorization", b"Bearer k"), (b"accept", b"*/*"))

    assert sent(*headers, strip=frozenset({b"authorization"})) == [(b"accept", b"*/*")]


def test_fields_nominated_by_connection_are_dropped_wherever_they_stand() -> None:
    headers = (
        (b"x-hop", b"1"),
        (b"connection", b"Keep-Alive , X-Hop"),
        (b"x-stay", b"2"),
        (b"connection", b"x-other"),
        (b"x-other", b"3"),
    )

    assert sent(*headers) == [(b"x-stay", b"2")]


@pytest.mark.parametrize("name", sorted(END_TO_END - ATTACHED - FORWARDED - {b"expect"}))
def test_connection_cannot_strip_an_end_to_end_field(name: bytes) -> None:
    assert sent((b"connection", b"close, " + name), (name, b"v")) == [(name, b"v")]


def test_connection_cannot_strip_what_the_gateway_attaches() -> None:
    org = (b"x-org-id", b"o")

    assert sent((b"connection", b"x-org-id, x-request-id"), add=(org,)) == [org]


names = st.sampled_from(
    [b"accept", b"x-a", b"x-b", b"cookie", b"content-length", b"te", b"upgrade", b"connection", b"x-org-id", b"x-hop"]
)
values = st.sampled_from([b"", b"1", b"close", b"x-hop", b"keep-alive, X-Hop", b"content-length", b"gzip"])
fields = st.lists(st.tuples(names, values), max_size=20).map(tuple)


@given(fields)
def test_everything_but_hop_by_hop_and_ours_crosses_in_order(headers: tuple[Field, ...]) -> None:
    options = {
        option.strip().lower() for name, value in headers if name == b"connection" for option in value.split(b",")
    }
    gone = HOP_BY_HOP | ATTACHED | ({b"x-hop"} & options)

    assert sent(*headers) == [field for field in headers if field[0] not in gone]
    as_written = tuple((name.title(), value) for name, value in headers)
    assert to_upstream(headers, as_written, strip=NOTHING, add=()) == [
        field for field in as_written if field[0].lower() not in gone
    ]


@given(fields)
def test_the_answer_crosses_whatever_its_case(headers: tuple[Field, ...]) -> None:
    shouted = [(name.title(), value) for name, value in headers]
    options = {
        option.strip().lower() for name, value in headers if name == b"connection" for option in value.split(b",")
    }
    gone = HOP_BY_HOP | ({b"x-hop"} & options)

    assert to_client(shouted) == [field for field in shouted if field[0].lower() not in gone]


def wire(*fields: Field, strip: frozenset[bytes] = NOTHING, chunked: bool = False, upgrade: bytes = b"") -> list[Field]:
    """What crosses of a request whose fields are written like this."""
    headers = tuple((name.lower(), value) for name, value in fields)
    return to_upstream(headers, fields, strip=strip, add=(), chunked=chunked, upgrade=upgrade)


def test_names_keep_the_case_and_the_place_they_had() -> None:
    written = ((b"HOST", b"a"), (b"X-CuStOm", b"1"), (b"accept", b"b"), (b"X-custom", b"2"))
    assert wire(*written) == list(written)
    assert wire(*written, strip=frozenset({b"host"})) == list(written[1:])


# Of one hop, and yet true of the next


A, B = (b"A", b"1"), (b"B", b"2")


def test_framing_stays_in_its_place_while_the_body_keeps_it() -> None:
    coding = (b"transfer-ENCODING", b"Chunked")
    assert wire(A, coding, B, chunked=True) == [A, coding, B]
    assert wire(A, coding, B) == [A, B]
    assert wire(A, coding, B, coding, chunked=True) == [A, coding, B]
    assert wire((b"Transfer-Encoding", b"gzip, chunked"), A, chunked=True) == [A]
    assert wire(A, (b"Content-LENGTH", b"3"), B) == [A, (b"Content-LENGTH", b"3"), B]


@pytest.mark.parametrize("value", [b"100-continue", b"100-Continue"])
def test_the_one_expectation_there_is_crosses_once(value: bytes) -> None:
    assert wire(A, (b"Expect", value), B, (b"Expect", value)) == [A, (b"Expect", value), B]
    assert wire(A, (b"Expect", value), B, strip=frozenset({b"expect"})) == [A, B]


@pytest.mark.parametrize("value", [b"", b"y 100-continue", b"100-continue, x", b"200-ok", b"100-continue;q=1"])
def test_another_expectation_does_not_cross(value: bytes) -> None:
    assert wire(A, (b"Expect", value)) == [A]


@pytest.mark.parametrize(
    ("te", "connection", "crosses"),
    [
        (b"trailers", b"TE", True),
        (b"Trailers", b"close, te", True),
        (b"gzip;q=0.5, trailers", b"TE, X-Hop", True),
        (b"trailers", b"keep-alive", False),
        (b"gzip", b"TE", False),
        (b"trailers;q=1", b"TE", False),
        (b"", b"TE", False),
    ],
)
def test_te_crosses_as_trailers_alone_and_only_when_connection_says_so(
    te: bytes, connection: bytes, crosses: bool
) -> None:
    option = next(option for option in connection.split(b", ") if option.lower() == b"te") if crosses else b""
    kept = [(b"Te", b"trailers"), (b"CONNECTION", option)] if crosses else []

    assert wire(A, (b"Te", te), (b"CONNECTION", connection), B, (b"X-Hop", b"")) == [
        A,
        *kept,
        B,
        *([] if b"X-Hop" in connection else [(b"X-Hop", b"")]),
    ]
    assert wire((b"CONNECTION", connection), A, (b"Te", te)) == [*kept[1:], A, *kept[:1]]


def test_a_handshake_crosses_only_when_the_walk_lets_it() -> None:
    handshake = (A, (b"Upgrade", b"WebSocket"), B, (b"connection", b"keep-alive, Upgrade"))

    assert wire(*handshake, upgrade=b"websocket") == [*handshake[:3], (b"connection", b"Upgrade")]
    assert wire(*handshake) == [A, B]
    assert wire(A, (b"Upgrade", b"websocket"), B, upgrade=b"websocket") == [A, B]
    offers = (b"Upgrade", b"h2c, websocket"), (b"Upgrade", b"h2c"), (b"Connection", b"upgrade, Upgrade")
    assert wire(*offers, upgrade=b"websocket") == [(b"Upgrade", b"websocket"), (b"Connection", b"Upgrade")]


def test_h2c_never_crosses() -> None:
    h2c = (b"Connection", b"Upgrade, HTTP2-Settings"), (b"Upgrade", b"h2c"), (b"HTTP2-Settings", b"AAMAAABk")
    assert wire(A, *h2c) == [A]
    assert b"http2-settings" not in [name.lower() for name, _ in wire(*h2c, upgrade=b"websocket")]


# Towards the client


@pytest.mark.parametrize("name", HOPS)
def test_a_hop_by_hop_field_of_the_answer_never_crosses(name: str) -> None:
    assert to_client([(name.title().encode(), b"v"), (b"A", b"1")]) == [(b"A", b"1")]


def test_upstream_retry_and_limit_fields_pass_verbatim_with_ours_beside_them() -> None:
    theirs = [
        (b"Retry-After", b"7"),
        (b"X-RateLimit-Remaining-Requests", b"0"),
        (b"Set-Cookie", b"a"),
        (b"Set-Cookie", b"b"),
    ]

    assert to_client(theirs, [(b"x-session-id", b"s")]) == [*theirs, (b"x-session-id", b"s")]


def test_a_field_that_must_not_stand_twice_gives_way() -> None:
    kept = to_client([(b"X-Request-Id", b"theirs")], [(b"x-request-id", b"ours")], strip=frozenset({b"x-request-id"}))

    assert kept == [(b"x-request-id", b"ours")]


def test_content_encoding_crosses_with_the_bytes_it_describes() -> None:
    headers = [(b"Content-Encoding", b"gzip"), (b"Content-Length", b"20")]

    assert to_client(headers) == headers


def test_a_chunked_answer_keeps_its_coding_in_its_place_while_it_stays_chunked() -> None:
    coding = (b"Transfer-ENCODING", b"chunked")
    assert to_client([A, coding, B], chunked=True) == [A, coding, B]
    assert to_client([A, coding, B]) == [A, B]
    assert to_client([A, coding, coding], chunked=True) == [A, coding]


def test_a_length_beside_a_coding_goes() -> None:
    both = [(b"Content-Length", b"5"), A, (b"Transfer-Encoding", b"chunked")]
    assert to_client(both, chunked=True) == [A, both[2]]
    assert to_client(both) == [A]


def test_a_switch_of_protocols_is_said_anew() -> None:
    fields = [A, (b"upgrade", b"websocket"), (b"Connection", b"keep-alive, Upgrade, X-Hop"), B, (b"X-Hop", b"1")]
    assert to_client(fields, upgrade=True) == [A, fields[1], (b"Connection", b"Upgrade"), B]
    assert to_client(fields) == [A, B]


# Trailers

# Written out, so that a name lost from the code is missed here.
NOT_BEHIND_A_BODY = """transfer-encoding content-length host trailer te connection upgrade content-encoding content-type
    content-range content-md5 authorization cookie set-cookie www-authenticate proxy-authenticate proxy-authorization
    cache-control expect max-forwards pragma range if-match if-none-match if-range if-modified-since if-unmodified-since
    age expires date location retry-after vary warning via x-org-id x-session-id x-request-id x-gateway-user
    x-forwarded-for x-forwarded-user forwarded x-api-key keep-alive""".split()


@pytest.mark.parametrize("name", [*NOT_BEHIND_A_BODY, *sorted(name.decode() for name in NOT_IN_TRAILERS)])
def test_a_field_that_was_acted_on_before_is_no_trailer(name: str) -> None:
    for written in (name, name.title(), name.replace("-", "_")):
        assert trailers([(written.encode(), b"v"), (b"X-Checksum", b"1")]) == [(b"X-Checksum", b"1")]


def test_other_trailers_cross_as_they_are() -> None:
    given = [(b"Grpc-Status", b"0"), (b"X-CHECKSUM", b"a"), (b"x-checksum", b"b"), (b"Server-Timing", b"db;dur=1")]
    assert trailers(given) == given
    assert trailers([(b"X_Tenant", b"o"), (b"x-tenant", b"o")], frozenset({b"x-tenant"})) == []


# Forwarded


def test_an_untrusted_peer_is_not_believed_about_the_client() -> None:
    claims = ((b"x-forwarded-for", b"1.1.1.1"), (b"x-forwarded-proto", b"https"), (b"x-real-ip", b"1.1.1.1"))

    assert forwarded(claims, "9.9.9.9", "http", "api.example", trusted=False) == [
        (b"x-forwarded-for", b"9.9.9.9"),
        (b"x-forwarded-proto", b"http"),
        (b"x-forwarded-host", b"api.example"),
    ]
    assert sent(*claims) == []


def test_a_trusted_peer_is_continued() -> None:
    claims = (
        (b"x-forwarded-for", b"1.1.1.1"),
        (b"accept", b"*/*"),
        (b"x-forwarded-for", b"10.0.0.2"),
        (b"x-forwarded-proto", b"https"),
    )

    assert forwarded(claims, "10.0.0.1", "http", "inner", trusted=True) == [
        (b"x-forwarded-proto", b"https"),
        (b"x-forwarded-for", b"1.1.1.1, 10.0.0.2, 10.0.0.1"),
        (b"x-forwarded-host", b"inner"),
    ]


@pytest.mark.parametrize(
    ("given", "peer_ip", "host", "expected"),
    [
        ([b"for=1.1.1.1"], "10.0.0.1", "api", b"for=1.1.1.1, for=10.0.0.1;proto=https;host=api"),
        ([b"for=a", b"for=b;by=c"], "10.0.0.1", "", b"for=a, for=b;by=c, for=10.0.0.1;proto=https"),
        ([b'for="[2001:db8::1]:80"'], "fd00::1", "h", b'for="[2001:db8::1]:80", for="[fd00::1]";proto=https;host=h'),
        ([b"for=a"], "10.0.0.1", "api:8080", b'for=a, for=10.0.0.1;proto=https;host="api:8080"'),
        ([b"for=a"], "10.0.0.1", 'x"y\\z', b'for=a, for=10.0.0.1;proto=https;host="x\\"y\\\\z"'),
        ([b"for=a"], "", "api", b"for=a, for=unknown;proto=https;host=api"),
        ([b""], "10.0.0.1", "", b"for=10.0.0.1;proto=https"),
        ([b'for="open'], "10.0.0.1", "", b"for=10.0.0.1;proto=https"),
        ([b'for="a\\"', b"for=b"], "10.0.0.1", "", b"for=b, for=10.0.0.1;proto=https"),
    ],
)
def test_forwarded_of_a_trusted_peer_gets_our_element_at_its_end(
    given: list[bytes], peer_ip: str, host: str, expected: bytes
) -> None:
    claims = tuple((b"forwarded", value) for value in given)

    assert dict(forwarded(claims, peer_ip, "https", host, trusted=True))[b"forwarded"] == expected
    assert b"forwarded" not in dict(forwarded(claims, peer_ip, "https", host, trusted=False))


def test_via_names_us_and_the_version_that_came_in() -> None:
    assert via("edge", "1.0") == (b"Via", b"1.0 edge")
    theirs = (b"via", b"1.1 cdn")
    assert sent(theirs, add=(via("edge", "1.1"),)) == [theirs, (b"Via", b"1.1 edge")]


def test_a_peer_without_an_address_adds_none() -> None:
    assert forwarded((), "", "http", "", trusted=False) == [(b"x-forwarded-proto", b"http")]


# The client's address


def address(peer_ip: str, *hops: str) -> str:
    return client_ip(peer_ip, tuple((b"x-forwarded-for", hop.encode()) for hop in hops), PROXIES)


@pytest.mark.parametrize(
    ("peer_ip", "hops", "expected"),
    [
        ("9.9.9.9", ("1.1.1.1",), "9.9.9.9"),
        ("10.0.0.1", (), "10.0.0.1"),
        ("10.0.0.1", ("1.1.1.1",), "1.1.1.1"),
        ("10.0.0.1", ("6.6.6.6, 1.1.1.1, 10.0.0.2",), "1.1.1.1"),
        ("10.0.0.1", ("6.6.6.6", "1.1.1.1", "10.0.0.2"), "1.1.1.1"),
        ("10.0.0.1", ("10.0.0.3, 10.0.0.2",), "10.0.0.3"),
        ("10.0.0.1", ("1.1.1.1, nonsense, 10.0.0.2",), "10.0.0.2"),
        ("10.0.0.1", ("1.1.1.1,",), "10.0.0.1"),
        ("10.0.0.1", ("unknown",), "10.0.0.1"),
        ("10.0.0.1", ("1.1.1.1:4711",), "1.1.1.1"),
        ("10.0.0.1", ("1.1.1.1:port",), "10.0.0.1"),
        ("10.0.0.1", ("[2001:db8::1]:443",), "2001:db8::1"),
        ("10.0.0.1", ("[2001:db8::1",), "10.0.0.1"),
        ("10.0.0.1", ("2001:DB8:0::1",), "2001:db8::1"),
        ("10.0.0.1", ("fe80::1%eth0",), "10.0.0.1"),
        ("10.0.0.1", ("::ffff:1.1.1.1",), "1.1.1.1"),
        ("::ffff:10.0.0.1", ("1.1.1.1",), "1.1.1.1"),
        ("fd00::1", ("1.1.1.1",), "1.1.1.1"),
        ("/run/gateway.sock", ("1.1.1.1",), "/run/gateway.sock"),
    ],
)
def test_the_client_is_the_rightmost_hop_we_do_not_run(peer_ip: str, hops: tuple[str, ...], expected: str) -> None:
    assert address(peer_ip, *hops) == expected


def test_a_mapped_peer_is_normalised_where_nobody_is_trusted() -> None:
    assert client_ip("::ffff:9.9.9.9", (), ()) == "9.9.9.9"
    assert client_ip("9.9.9.9", ((b"x-forwarded-for", b"1.1.1.1"),), ()) == "9.9.9.9"


def test_reading_stops_at_the_bound_of_hops() -> None:
    trusted = [f"10.1.0.{number}" for number in range(HOPS_MAX)]

    assert address("10.0.0.1", ", ".join(["1.1.1.1", *trusted[1:]])) == "1.1.1.1"
    assert address("10.0.0.1", ", ".join(["1.1.1.1", *trusted])) == trusted[0]


def test_a_rotating_forged_header_does_not_change_the_client() -> None:
    assert {address("10.0.0.1", f"7.7.7.{number}, 1.1.1.1") for number in range(50)} == {"1.1.1.1"}


@given(st.binary(max_size=80))
def test_any_garbage_in_the_header_gives_a_valid_address(garbage: bytes) -> None:
    client = client_ip("10.0.0.1", ((b"x-forwarded-for", garbage),), PROXIES)

    assert ip_network(client).num_addresses == 1


def test_trust_is_of_networks_and_not_of_text() -> None:
    assert is_trusted("10.9.9.9", PROXIES) and is_trusted("::ffff:10.9.9.9", PROXIES)
    assert not any(is_trusted(peer, PROXIES) for peer in ("11.0.0.1", "10.0.0.1.evil", ""))
    assert not is_trusted("10.9.9.9", ())
