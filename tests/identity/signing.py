"""Key pairs of test issuers: made once per run, by number, since an RSA key takes a tenth of a second."""

import base64
import json
from functools import cache
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

SECRET = "an-hmac-secret-of-at-least-32-bytes!"
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@cache
def rsa_key(number: int = 0, bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


@cache
def ec_key(number: int = 0) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def public_pem(key: PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def private_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def jwk(key: PrivateKey, **members: Any) -> dict[str, Any]:
    """The public JWK of `key` with these further members; None takes one away."""
    public = key.public_key()
    if isinstance(public, rsa.RSAPublicKey):
        made = RSAAlgorithm.to_jwk(public, as_dict=True)
    else:
        made = ECAlgorithm.to_jwk(public, as_dict=True)
    made.pop("key_ops", None)
    return {name: value for name, value in {**made, **members}.items() if value is not None}


def jwks(*keys: dict[str, Any]) -> bytes:
    return json.dumps({"keys": keys}).encode()


def sign(key: PrivateKey | str, claims: dict[str, Any], algorithm: str, **head: Any) -> str:
    return jwt.encode(claims, key, algorithm=algorithm, headers=head)


def segment(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


class JwksServer:
    """Stands for the issuer's server: a document per URL, an outage on demand, and a count of what was asked."""

    def __init__(self, body: bytes = b"") -> None:
        self.body = body
        self.error: Exception | None = None
        self.fetches = 0

    async def fetch(self, url: str) -> bytes:
        assert url == "https://issuer.example/jwks.json"
        self.fetches += 1
        if self.error is not None:
            raise self.error
        return self.body
