"""A certificate authority that tests make for themselves."""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_HOUR = datetime.timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Pems:
    """Files: an authority, a certificate that it signed for 127.0.0.1 and localhost, and that one's key."""

    ca: Path
    cert: Path
    key: Path


def make_pems(directory: Path) -> Pems:
    """An authority of its own, and what it signed, in `directory`."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of a test")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server of a test")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    ca_cert = _builder(authority, authority, ca_key, ca_key).add_extension(x509.BasicConstraints(True, None), True)
    cert = _builder(subject, authority, key, ca_key).add_extension(x509.SubjectAlternativeName(names), False)
    pems = Pems(directory / "ca.pem", directory / "cert.pem", directory / "key.pem")
    pems.ca.write_bytes(ca_cert.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    pems.cert.write_bytes(cert.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    pems.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pems


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, issuer_key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        x509.CertificateBuilder(
            issuer, subject, key.public_key(), x509.random_serial_number(), now - _HOUR, now + _HOUR
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(issuer_id, False)
    )
