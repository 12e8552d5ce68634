"""A key that verifies JWTs: read from a secret, a PEM file or a JWKS document. Pure.

Every key carries exactly one algorithm, decided by what the key *is* and never by what a token says: a secret is
HS256, an RSA key RS256, a P-256 key ES256. That is what makes algorithm confusion (RFC 8725 §2.1) impossible here.
"""

import json
from dataclasses import dataclass

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from cryptography.x509 import load_pem_x509_certificate
from jwt import PyJWK
from jwt.exceptions import PyJWTError

from gateway.errors import ConfigError

#: A JWKS document with more keys than this is not read to its end.
KEYS_MAX = 64
DOCUMENT_BYTES_MAX = 262_144
#: RFC 7518 §3.2: an HMAC key is at least as long as the hash.
SECRET_BYTES_MIN = 32
RSA_BITS_MIN = 2_048


@dataclass(frozen=True, slots=True)
class VerifyKey:
    """One key and the one algorithm it verifies."""

    algorithm: str
    #: None: the key says nothing about its id and may be tried for any token.
    kid: str | None
    material: RSAPublicKey | EllipticCurvePublicKey | bytes


def secret_key(secret: str) -> VerifyKey:
    """The HS256 key of a shared secret. Raises ConfigError when it is too short or is no secret at all."""
    material = secret.encode()
    if b"-----BEGIN" in material:
        raise ConfigError(["identity.jwt: `secret` holds a PEM key; name its file in `pem_file` instead"])
    if len(material) < SECRET_BYTES_MIN:
        raise ConfigError([f"identity.jwt: `secret` is shorter than {SECRET_BYTES_MIN} bytes (RFC 7518 §3.2)"])
    return VerifyKey("HS256", None, material)


def pem_key(pem: bytes, origin: str) -> VerifyKey:
    """The key of a PEM public key or certificate. Raises ConfigError, naming `origin`, when it is anything else."""
    try:
        if b"-----BEGIN CERTIFICATE-----" in pem:
            key: object = load_pem_x509_certificate(pem).public_key()
        else:
            key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise ConfigError([f"identity.jwt: {origin} holds no PEM public key or certificate"]) from exc
    verify_key = _asymmetric(key, None)
    if verify_key is None:
        raise ConfigError([f"identity.jwt: {origin} is neither RSA of {RSA_BITS_MIN} bits or more nor P-256"])
    return verify_key


def parse_jwks(body: bytes) -> tuple[VerifyKey, ...]:
    """The document's keys that verify RS256 or ES256 signatures; others are passed over.

    Raises ValueError when the document is no JWKS or has no such key: an empty answer must not lock everybody out.
    """
    if len(body) > DOCUMENT_BYTES_MAX:
        raise ValueError("the JWKS document is too large")
    try:
        document = json.loads(body)
    except RecursionError as exc:
        raise ValueError("the JWKS document is nested too deep") from exc
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError("the JWKS document has no list of keys")
    found = (_from_jwk(entry) for entry in entries[:KEYS_MAX] if isinstance(entry, dict))
    keys = tuple(key for key in found if key is not None)
    if not keys:
        raise ValueError("the JWKS document has no key that verifies RS256 or ES256")
    return keys


def _from_jwk(jwk: dict[str, object]) -> VerifyKey | None:
    """RFC 7517 §4: `use` and `key_ops` say what a key is for, `alg` with what; a key for something else is not ours."""
    algorithm, members = {
        "RSA": ("RS256", ("kty", "n", "e")),
        "EC": ("ES256", ("kty", "crv", "x", "y")),
    }.get(str(jwk.get("kty")), (None, ()))
    operations = jwk.get("key_ops", ["verify"])
    kid = jwk.get("kid")
    if (
        algorithm is None
        or jwk.get("alg", algorithm) != algorithm
        or jwk.get("use", "sig") != "sig"
        or not (isinstance(operations, list) and "verify" in operations)
        or not (kid is None or isinstance(kid, str))
    ):
        return None
    try:
        # Only the public members: a document that leaks a private key still gives a public one.
        key = PyJWK({name: jwk[name] for name in members}, algorithm).key
    except (PyJWTError, KeyError, TypeError, ValueError):
        return None
    return _asymmetric(key, kid)


def _asymmetric(key: object, kid: str | None) -> VerifyKey | None:
    if isinstance(key, RSAPublicKey) and key.key_size >= RSA_BITS_MIN:
        return VerifyKey("RS256", kid, key)
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return VerifyKey("ES256", kid, key)
    return None
