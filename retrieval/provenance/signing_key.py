"""The key that signs pictures, and its certificates: read from PEM files, or made for demonstrations.

A key of `demo_credentials` lives as long as its process. Its certificate says that no authority confirms it.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from retrieval.errors import UserError
from retrieval.extras import extras_named

with extras_named():
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
        load_pem_private_key,
    )
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DEMO_SIGNER = "demo key of laion-rdm: no authority confirms it"
DEMO_DAYS = 365
CURVES = {256: "es256", 384: "es384", 521: "es512"}
"""Names of C2PA for ECDSA, by bits of the curve."""
_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


@dataclass(frozen=True)
class Credentials:
    """A key and its certificates."""

    algorithm: str
    """C2PA's name of the signature algorithm."""
    certificates: bytes
    """PEM, the signer's first, then those of the authorities that issued it."""
    private_key: bytes = field(repr=False)
    """PEM (PKCS 8), not encrypted."""


def read_credentials(certificate: str, private_key: str) -> Credentials:
    """The credentials in two PEM files. Raises UserError if one cannot be read, or if they do not belong together."""
    certificates, key_bytes = _read(certificate), _read(private_key)
    try:
        [signer, *_] = x509.load_pem_x509_certificates(certificates)
        key = load_pem_private_key(key_bytes, password=None)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{certificate} and {private_key}: wanted PEM certificates, the signer's first, and a PEM private key "
            f"without a password; {error}"
        ) from error
    if _public(key.public_key()) != _public(signer.public_key()):
        raise UserError(f"{private_key} is not the key of the first certificate in {certificate}. Name its own key.")
    return Credentials(_algorithm(key, private_key), certificates, _key_bytes(key))


def demo_credentials() -> Credentials:
    """New credentials (ECDSA, P-256) of an authority that exists only here."""
    authority, signer = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = _name("authority of the demo key of laion-rdm")
    own = _certificate(issuer, authority, (issuer, authority), is_authority=True)
    certificate = _certificate(_name(DEMO_SIGNER), signer, (issuer, authority), is_authority=False)
    chain = b"".join(each.public_bytes(Encoding.PEM) for each in (certificate, own))
    return Credentials("es256", chain, _key_bytes(signer))


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path or 'the file of the key or certificate'} cannot be read: {error}") from error


def _algorithm(key: Any, location: str) -> str:
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.key_size in CURVES:
        return CURVES[key.curve.key_size]
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPrivateKey):
        return "ps256"
    raise UserError(f"{location}: {type(key).__name__} cannot sign pictures. Use ECDSA (P-256), Ed25519 or RSA.")


def _public(key: Any) -> bytes:
    return bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def _key_bytes(key: Any) -> bytes:
    return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _name(text: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "laion-rdm"), x509.NameAttribute(NameOID.COMMON_NAME, text)]
    )


def _certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: tuple[x509.Name, ec.EllipticCurvePrivateKey],
    is_authority: bool,
) -> x509.Certificate:
    """A certificate of version 3 with the extensions that C2PA requires."""
    issuer_name, issuer_key = issuer
    now = datetime.now(UTC)
    allowed = {"key_cert_sign", "crl_sign"} if is_authority else {"digital_signature"}
    builder = (
        x509.CertificateBuilder(issuer_name, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=DEMO_DAYS))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**{usage: usage in allowed for usage in _USAGES}), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if not is_authority:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(usage, critical=True)
    return builder.sign(issuer_key, hashes.SHA256())
