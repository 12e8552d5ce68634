"""JSON Web Tokens: HS256, RS256 and ES256, with keys from the configuration or a JWKS server.

Owns what makes a token acceptable (RFC 7519, RFC 8725). Does not own keys (`verify_key`, `jwks`) or what the claims
say (`claims`); signatures, base64 and JSON are PyJWT's.

The steps, in this order: form, algorithm (from the configured list), key (by algorithm and id), signature, issuer and
audience, times, claims. Nothing of the payload is looked at before the signature is good. Messages name the step that
failed and never quote the token.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Protocol

import jwt
from jwt.exceptions import (
    InvalidAudienceError,
    InvalidIssuerError,
    InvalidSignatureError,
    MissingRequiredClaimError,
    PyJWTError,
)

from gateway.errors import ConfigError, StoreUnavailable, Unauthenticated
from gateway.identity.claims import ClaimNames, principal, valid_until_ms
from gateway.identity.jwks import Fetch, KeySet, RemoteKeys, StaticKeys
from gateway.identity.source import Clock, Source, bearer, values
from gateway.identity.verify_key import VerifyKey, pem_key, secret_key
from gateway.types import Facts, Principal

TOKEN_BYTES_MAX = 16_384
#: Verified tokens remembered; one RS256 check costs some 50-100 µs of CPU.
VERIFIED_MAX = 10_000
#: Signatures checked for one token when its header does not say which key it is.
CANDIDATES_MAX = 8


class JwtKeyConfig(Protocol):
    """Exactly one of the three is set."""

    @property
    def jwks(self) -> str | None: ...
    @property
    def secret(self) -> str | None: ...
    @property
    def pem_file(self) -> str | PathLike[str] | None: ...


class JwtConfig(ClaimNames, Protocol):
    """What this source reads of its part of `gateway.yaml`."""

    @property
    def keys(self) -> Sequence[JwtKeyConfig]: ...
    @property
    def algorithms(self) -> Sequence[str]: ...
    @property
    def issuer(self) -> str | None: ...
    @property
    def audience(self) -> str | None: ...
    @property
    def header(self) -> str: ...
    @property
    def leeway_ms(self) -> int: ...
    @property
    def jwks_ttl_ms(self) -> int: ...


@dataclass(frozen=True, slots=True)
class _Verified:
    principal: Principal
    #: Wall clock; the end of the token's life, leeway included.
    until_ms: int
    #: The keys that vouched for it, and which state of them.
    keys: KeySet
    version: int


class JwtSource(Source):
    """Recognises `Bearer x.y.z` in one field; in a field other than Authorization the scheme may be missing.

    A token with an audience is refused when none is configured: it was made for somebody, and not knowingly for us.
    """

    def __init__(
        self,
        config: JwtConfig,
        fetch: Fetch,
        *,
        monotonic_ms: Clock,
        wall_ms: Clock,
        claims: frozenset[str] = frozenset(),
    ) -> None:
        """Reads PEM files. Raises ConfigError for a key that cannot be used.

        claims: names of those that a principal carries on, for the limits that are per them.
        """
        self._config = config
        self._claims_kept = claims
        self._header = config.header.lower().encode()
        self._wall_ms = wall_ms
        self._jwt = jwt.PyJWT()
        self._key_sets = tuple(_key_set(key, config, fetch, monotonic_ms) for key in config.keys)
        #: SHA-256 of the token -> what it proved. Least recently used first.
        self._verified: OrderedDict[bytes, _Verified] = OrderedDict()

    @property
    def remembered(self) -> int:
        """Number of tokens that need no signature check."""
        return len(self._verified)

    async def identify(self, facts: Facts) -> Principal | None:
        tokens = set(self._tokens_in(facts))
        if not tokens:
            return None
        if len(tokens) > 1:
            raise Unauthenticated("Different tokens were presented; send one.")
        token = tokens.pop()
        if len(token) > TOKEN_BYTES_MAX:
            raise Unauthenticated(f"The token is longer than {TOKEN_BYTES_MAX} bytes.")
        digest = sha256(token).digest()
        verified = await self._recall(digest)
        if verified is None:
            verified = await self._verify(token)
            self._verified[digest] = verified
            if len(self._verified) > VERIFIED_MAX:
                self._verified.popitem(last=False)
        return verified.principal

    def remembers(self, facts: Facts) -> bool | None:
        tokens = set(self._tokens_in(facts))
        if len(tokens) != 1:
            return False if tokens else None
        # Its keys may have changed: then its signature is checked again, which needs no more than that.
        verified = self._verified.get(sha256(tokens.pop()).digest())
        return verified is not None and self._wall_ms() < verified.until_ms

    def credential_headers(self, facts: Facts) -> frozenset[bytes]:
        return frozenset({self._header}) if self._tokens_in(facts) else frozenset()

    async def close(self) -> None:
        for key_set in self._key_sets:
            await key_set.close()

    def _tokens_in(self, facts: Facts) -> list[bytes]:
        found = []
        for value in values(facts, self._header):
            token = bearer(value)
            if token is None and self._header != b"authorization":
                token = value
            if token is not None and token.count(b".") == 2:
                found.append(token)
        return found

    async def _recall(self, digest: bytes) -> _Verified | None:
        verified = self._verified.get(digest)
        if verified is None:
            return None
        # Asking for the keys keeps them fresh, and notices that they are too old to believe.
        await verified.keys.keys()
        if verified.version == verified.keys.version and self._wall_ms() < verified.until_ms:
            if digest in self._verified:
                self._verified.move_to_end(digest)
            return verified
        self._verified.pop(digest, None)
        return None

    async def _verify(self, token: bytes) -> _Verified:
        algorithm, kid = self._read_head(token)
        key_sets = [key_set for key_set in self._key_sets if algorithm in key_set.algorithms]
        away: StoreUnavailable | None = None
        named = renewed = False
        while True:
            for key_set in key_sets:
                try:
                    keys = await key_set.keys()
                except StoreUnavailable as exc:
                    away = exc
                    continue
                for key in _candidates(keys, algorithm, kid):
                    named = named or (kid is not None and key.kid == kid)
                    claims = self._claims(token, key)
                    if claims is not None:
                        return self._accept(claims, key_set)
            if named or renewed:
                break
            # The key may be newer than what we know. A key found by its id needs no second look: the token is forged.
            renewed = any([await key_set.renewed() for key_set in key_sets])
            if not renewed:
                break
        if away is not None and not named:
            raise away
        raise Unauthenticated("The token's signature is not valid, or its key is not known.")

    def _read_head(self, token: bytes) -> tuple[str, str | None]:
        """The token's algorithm, one of the configured, and its key id."""
        try:
            head = jwt.get_unverified_header(token)
        except PyJWTError as exc:
            raise Unauthenticated("The token is malformed.") from exc
        # We understand no extension, `b64` (RFC 7797) included, so whatever is critical is refused (RFC 7515 §4.1.11).
        if "crit" in head or "b64" in head:
            raise Unauthenticated("The token needs an extension that is not supported.")
        algorithm = head.get("alg")
        if not isinstance(algorithm, str) or algorithm not in self._config.algorithms:
            raise Unauthenticated("The token's algorithm is not accepted.")
        return algorithm, head.get("kid")

    def _claims(self, token: bytes, key: VerifyKey) -> Mapping[str, object] | None:
        """The claims of a token signed with `key` for us; None when the signature is not that key's."""
        try:
            return self._jwt.decode(
                token,
                key.material,
                algorithms=[key.algorithm],
                audience=self._config.audience,
                issuer=self._config.issuer,
                options={
                    "require": ["exp"],
                    # Times are checked below, against our clock; `sub` and `jti` only where they are used.
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                    "verify_sub": False,
                    "verify_jti": False,
                },
            )
        except InvalidSignatureError:
            return None
        except MissingRequiredClaimError as exc:
            raise Unauthenticated(f"The token has no claim `{exc.claim}`.") from exc
        except InvalidIssuerError as exc:
            raise Unauthenticated("The token is from another issuer.") from exc
        except InvalidAudienceError as exc:
            raise Unauthenticated("The token is for another audience.") from exc
        except PyJWTError as exc:
            raise Unauthenticated("The token is malformed.") from exc

    def _accept(self, claims: Mapping[str, object], key_set: KeySet) -> _Verified:
        until_ms = valid_until_ms(claims, self._wall_ms(), self._config.leeway_ms)
        return _Verified(principal(claims, self._config, self._claims_kept), until_ms, key_set, key_set.version)


def _key_set(key: JwtKeyConfig, config: JwtConfig, fetch: Fetch, monotonic_ms: Clock) -> KeySet:
    if key.jwks is not None:
        return RemoteKeys(key.jwks, fetch, ttl_ms=config.jwks_ttl_ms, monotonic_ms=monotonic_ms)
    if key.secret is not None:
        return StaticKeys(secret_key(key.secret))
    if key.pem_file is None:
        raise ConfigError(["identity.jwt: a key needs one of `jwks`, `secret`, `pem_file`"])
    path = Path(key.pem_file)
    try:
        pem = path.read_bytes()
    except OSError as exc:
        raise ConfigError([f"identity.jwt: {path} cannot be read: {exc.strerror}"]) from exc
    return StaticKeys(pem_key(pem, str(path)))


def _candidates(keys: Sequence[VerifyKey], algorithm: str, kid: str | None) -> list[VerifyKey]:
    """The keys to try: of this algorithm and, where both sides name one, of this id; the named ones first."""
    fitting = [key for key in keys if key.algorithm == algorithm and (kid is None or key.kid in (kid, None))]
    fitting.sort(key=lambda key: key.kid is None)
    return fitting[:CANDIDATES_MAX]
