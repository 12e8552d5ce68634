"""Names of header fields, in lower case, by what the gateway does with them. Only sets; crossing.py applies them."""

#: RFC 9110 §7.6.1, and what describes one connection without saying so. `HTTP2-Settings` belongs to an upgrade to h2c
#: (RFC 7540 §3.2.1), which would turn a connection that we watch into one that we cannot read.
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"http2-settings",
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

#: What proxies before us say about the client and what it asked for; whatever begins with FORWARDED_PREFIX belongs to
#: them. The last two make some frameworks serve another path than the one that a route was found for.
FORWARDED = frozenset(
    {
        b"forwarded",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-forwarded-prefix",
        b"x-forwarded-proto",
        b"x-real-ip",
        b"x-original-url",
        b"x-rewrite-url",
    }
)
FORWARDED_PREFIX = b"x-forwarded-"

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
        b"expect",
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

#: What RFC 9110 §6.5.1 keeps out of trailers: framing, routing, modifiers of requests, authentication, control of
#: answers and of caches, and how content is to be processed (`content-` names are looked at by their prefix). Some
#: recipients merge trailers into the header they acted on before.
NOT_IN_TRAILERS = (
    HOP_BY_HOP
    | ATTACHED
    | FORWARDED
    | {
        b"age",
        b"api-key",
        b"authentication-info",
        b"authorization",
        b"cache-control",
        b"cookie",
        b"date",
        b"expect",
        b"expires",
        b"host",
        b"if-match",
        b"if-modified-since",
        b"if-none-match",
        b"if-range",
        b"if-unmodified-since",
        b"location",
        b"max-forwards",
        b"pragma",
        b"range",
        b"retry-after",
        b"set-cookie",
        b"trailer",
        b"vary",
        b"via",
        b"warning",
        b"www-authenticate",
        b"x-api-key",
    }
)
