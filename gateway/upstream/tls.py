"""TLS to upstreams: whom to trust, who we are, and resuming an earlier session with the same host.

asyncio and uvloop have no way to pass a session to a connection, but both make their TLS objects with the context's
`wrap_bio`, so a context of our own can. A resumed handshake costs the upstream no signature and us no verification.
"""

import ssl
import sys
from typing import Never


class ResumingContext(ssl.SSLContext):
    """A client context that offers each host the last session it had with it.

    By host, because a resumed session is not verified again: it must never be offered to another name.
    """

    _sessions: dict[str | bytes, ssl.SSLSession]

    def __init__(self, protocol: int = ssl.PROTOCOL_TLS_CLIENT) -> None:
        # One entry per host, and hosts come from the configuration.
        self._sessions = {}

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        if session is None and server_hostname is not None:
            session = self._sessions.get(server_hostname)
        return super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)

    def remember(self, host: str | bytes, session: ssl.SSLSession) -> None:
        self._sessions[host] = session

    def forget(self, host: str | bytes) -> None:
        self._sessions.pop(host, None)


def remember_session(tls: ssl.SSLObject) -> None:
    """The next handshake with the same host may resume this one.

    To be called after bytes were read: TLS 1.3 sends its tickets behind the handshake.
    """
    context, host, session = tls.context, tls.server_hostname, tls.session
    if isinstance(context, ResumingContext) and host is not None and session is not None:
        context.remember(host, session)


def forget_session(context: ssl.SSLContext, host: str) -> None:
    """The next handshake with `host` begins anew: this one failed, and the session may be why."""
    if isinstance(context, ResumingContext):
        context.forget(host)


def tls_context(
    *, verify: bool = True, ca_file: str | None = None, cert_file: str | None = None, key_file: str | None = None
) -> ssl.SSLContext:
    """A client context for HTTP/1.1.

    ca_file: PEM of authorities to trust instead of the system's. cert_file: PEM of our certificate and those between
    it and its authority; key_file: PEM of its key, unless that is in cert_file as well. Raises OSError (ssl.SSLError
    among them) for files that cannot be used.
    """
    context = ResumingContext(ssl.PROTOCOL_TLS_CLIENT)
    if sys.version_info >= (3, 13):
        # As ssl.create_default_context, which cannot make a subclass.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT
    if ca_file is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        context.load_verify_locations(cafile=ca_file)
    context.set_alpn_protocols(["http/1.1"])
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if cert_file is not None:
        context.load_cert_chain(cert_file, key_file, password=_no_password)
    return context


def _no_password() -> Never:
    """Without this OpenSSL would ask on the terminal and wait."""
    raise ssl.SSLError("the key is encrypted")
