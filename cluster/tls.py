"""Certificates: the endpoint's, which its operator brings, and those that the nodes of a cluster show each other.

tls.crt, tls.key              the endpoint's chain and its key (PEM), in the key store's folder, put there by whoever renews
                              them; an endpoint with `serve.tls` looks at them each second
nodes/ca.crt, ca.key          made by `node_certificate`: who signs nodes
nodes/ADDRESS.crt, .key       … and what one node shows; Ray takes them by environment variables (RAY_USE_TLS)
"""

import datetime
import ipaddress
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ..errors import KeyStoreError
from .keys import KeyStore
from .storage import in_memory, write_bytes

CERTIFICATE, KEY = "tls.crt", "tls.key"
YEARS_OF_A_NODE = 2


def endpoint_files(keys: KeyStore) -> tuple[Path, Path]:
    return keys.folder / CERTIFICATE, keys.folder / KEY


def endpoint_pem(keys: KeyStore) -> bytes:
    """Chain and key in one, as HAProxy reads them. Raises KeyStoreError: missing, readable by others, not a pair, run out."""
    certificate, key = endpoint_files(keys)
    if not certificate.is_file():
        raise KeyStoreError(
            f"{certificate}: not found: `serve.tls` needs the certificate's chain there, and its key in {key.name}"
        )
    pem = certificate.read_bytes().rstrip() + b"\n" + keys.read(key)
    with in_memory(pem, "tls.pem") as together:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(together)
        except ssl.SSLError as error:
            raise KeyStoreError(f"{certificate}: cannot be used with {key.name}: {error.reason or error}") from None
    until = x509.load_pem_x509_certificate(pem).not_valid_after_utc
    if until < datetime.datetime.now(datetime.UTC):
        raise KeyStoreError(f"{certificate}: ran out on {until:%Y-%m-%d}: put a new one in its place")
    return pem


def node_certificate(keys: KeyStore, address: str) -> dict[str, str]:
    """What Ray on the node with this IP address or host name needs in its environment, so that nodes talk by mutual TLS.

    The authority is made when it is missing, the certificate each time, for two years. Every node gets files of its own; the
    authority's key stays here.
    """
    folder = keys.folder / "nodes"
    authority, authority_key = _authority(folder)
    private = ec.generate_private_key(ec.SECP256R1())
    try:
        names: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(address))]
    except ValueError:
        names = [x509.DNSName(address)]
    names += [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]  # a node's processes among themselves
    certificate = (
        _certificate(address, authority.subject, private.public_key(), YEARS_OF_A_NODE)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    file, key = folder / f"{address}.crt", folder / f"{address}.key"
    write_bytes(key, _pem(private), mode=0o600)
    write_bytes(file, certificate.public_bytes(serialization.Encoding.PEM), mode=0o600)
    paths = {"SERVER_CERT": file, "SERVER_KEY": key, "CA_CERT": folder / "ca.crt"}
    return {"RAY_USE_TLS": "1"} | {f"RAY_TLS_{name}": str(path.resolve()) for name, path in paths.items()}


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    file, key_file = folder / "ca.crt", folder / "ca.key"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        private = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "heliograph nodes")])
        made = (
            _certificate("heliograph nodes", subject, private.public_key(), 10)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(private, hashes.SHA256())
        )
        write_bytes(key_file, _pem(private), mode=0o600)
        write_bytes(file, made.public_bytes(serialization.Encoding.PEM), mode=0o600)
    private = serialization.load_pem_private_key(key_file.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    return x509.load_pem_x509_certificate(file.read_bytes()), private


def _certificate(name: str, issuer: x509.Name, public: ec.EllipticCurvePublicKey, years: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=365 * years))
    )


def _pem(private: ec.EllipticCurvePrivateKey) -> bytes:
    return private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
