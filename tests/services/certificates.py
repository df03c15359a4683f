"""Certificates for TLS tests: an authority of a day, a broker's certificate and a client's."""

import datetime as dt
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """PEM files. A keystore is a private key (PKCS 8) followed by its certificate, as Kafka reads it."""

    authority: Path
    broker_keystore: Path
    client_certificate: Path
    client_key: Path

    @classmethod
    def create(cls, folder: Path) -> Self:
        """Sign a broker for 127.0.0.1 and localhost, and a client named `client`."""
        folder.mkdir(parents=True, exist_ok=True)
        authority = _Authority()
        broker_key, broker_certificate = authority.sign("broker")
        client_key, client_certificate = authority.sign("client")
        return cls(
            authority=_write(folder / "authority.pem", authority.pem),
            broker_keystore=_write(folder / "broker.pem", broker_key + broker_certificate),
            client_certificate=_write(folder / "client.pem", client_certificate),
            client_key=_write(folder / "client.key", client_key),
        )


class _Authority:
    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("cqrs-decor tests")
        usage = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=True,
            crl_sign=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        builder = (
            _builder(subject=self._name, issuer=self._name, key=self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
        )
        self.pem = _pem(builder.sign(self._key, hashes.SHA256()))

    def sign(self, subject: str) -> tuple[bytes, bytes]:
        """A new key and its certificate."""
        key = ec.generate_private_key(ec.SECP256R1())
        loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = (
            _builder(subject=_name(subject), issuer=self._name, key=key.public_key())
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost"), loopback]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        return _key_pem(key), _pem(builder.sign(self._key, hashes.SHA256()))


def _builder(*, subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
