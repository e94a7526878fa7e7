"""Ed25519 keys (RFC 8032) and signatures of model bundles.

Imported only where a key is at hand: it loads the package `cryptography`.
"""

import base64
import binascii
import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from lungwatch.errors import ConfigError, ModelError
from lungwatch.files import create_private

_FORMAT = "lungwatch bundle signature 1"
_MAX_KEY_BYTES = 64 << 10
_PUBLIC = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)
KEY_ENDINGS = (".pem", ".pub")


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Content of `bundle.sig`.

    Attributes
    ----------
    fingerprint
        Of the key, as the file states it: not to be trusted before the check.
    value
        64 bytes.
    """

    fingerprint: str
    value: bytes

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        fields = {
            "format": _FORMAT,
            "key": self.fingerprint,
            "signature": base64.b64encode(self.value).decode("ascii"),
        }
        return (json.dumps(fields, indent=2) + "\n").encode("ascii")

    @classmethod
    def from_bytes(cls, data: bytes) -> "Signature":
        """Read the file's content.

        Raises
        ------
        ModelError
            If it is not what `to_bytes` writes.
        """
        damaged = ModelError("bundle.sig is damaged: sign the bundle again")
        try:
            fields = json.loads(data.decode("ascii"))
            if set(fields) != {"format", "key", "signature"} or fields["format"] != _FORMAT:
                raise damaged
            fingerprint = fields["key"]
            value = base64.b64decode(fields["signature"], validate=True)
        except (ValueError, TypeError, RecursionError, binascii.Error) as error:
            raise damaged from error
        if not isinstance(fingerprint, str) or not re.fullmatch("[0-9a-f]{64}", fingerprint):
            raise damaged
        if len(value) != 64:
            raise damaged
        return cls(fingerprint=fingerprint, value=value)

    def is_of(self, key: Ed25519PublicKey, statement: bytes) -> bool:
        """Return whether a key made this signature over a statement."""
        try:
            key.verify(self.value, statement)
        except InvalidSignature:
            return False
        return True


def sign(statement: bytes, key: Ed25519PrivateKey) -> Signature:
    """Sign a bundle's statement."""
    return Signature(fingerprint=fingerprint(key.public_key()), value=key.sign(statement))


def fingerprint(key: Ed25519PublicKey) -> str:
    """Return the SHA-256 of the key's SubjectPublicKeyInfo (RFC 8410), 64 hexadecimal digits.

    `openssl pkey -pubin -in FILE -outform DER | sha256sum` tells the same.
    """
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).hexdigest()


def write_key_pair(private: Path, public: Path, passphrase: bytes | None) -> str:
    """Make a key pair, write both halves as PEM, and return the fingerprint.

    The private half is PKCS #8, mode 0600, encrypted with `passphrase` if there is one.

    Raises
    ------
    ConfigError
        If one of the files is there already or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase)
    texts = {
        private: key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        ),
        public: key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
    }
    for path in texts:
        if path.exists() or path.is_symlink():
            raise ConfigError(f"{path} exists already: a key is never overwritten")
    for path, text in texts.items():
        try:
            create_private(path, text)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    public.chmod(0o644)
    return fingerprint(key.public_key())


def load_private_key(path: Path, passphrase: bytes | None) -> Ed25519PrivateKey:
    """Read a private key.

    Raises
    ------
    ConfigError
        If it cannot be read, others may read it, it is not an Ed25519 key, or the passphrase is
        wrong.
    """
    data = read_secret(path)
    try:
        key = serialization.load_pem_private_key(data, passphrase)
    except TypeError as error:  # a passphrase is missing, or not needed
        wanted = (
            "is encrypted: name --passphrase-file" if passphrase is None else "is not encrypted"
        )
        raise ConfigError(f"the private key {path} {wanted}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} is not a private key in PEM, or the passphrase is wrong"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} is not an Ed25519 key: make one with `lungwatch model keygen`")
    return key


def read_secret(path: Path) -> bytes:
    """Read a file that nobody else may read.

    Raises
    ------
    ConfigError
        If it cannot be read, is too large, or its mode lets others read or change it.
    """
    data, mode = _read(path)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"others may read or change {path}: chmod 600 it first")
    return data


def load_public_keys(path: Path) -> dict[str, Ed25519PublicKey]:
    """Read the keys of a file, or of a folder's files that end in .pem or .pub.

    Returns
    -------
    dict
        By their fingerprints; never empty.

    Raises
    ------
    ConfigError
        If there is none, a file holds anything but Ed25519 public keys, or everybody may write to
        it.
    """
    is_folder = path.is_dir()
    try:
        files = sorted(path.iterdir()) if is_folder else [path]
        if is_folder:
            _refuse_open(path, path.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"'trusted_keys': {path} cannot be read: {error.strerror}") from error
    found = {}
    for file in files:
        if not is_folder or file.suffix in KEY_ENDINGS:
            found.update({fingerprint(key): key for key in _public_keys(file)})
    if not found:
        raise ConfigError(f"'trusted_keys': no file in {path} ends in .pem or .pub")
    return found


def _public_keys(path: Path) -> list[Ed25519PublicKey]:
    data, mode = _read(path)
    _refuse_open(path, mode)
    if b"PRIVATE KEY" in data:
        raise ConfigError(
            f"'trusted_keys': {path} holds a private key; it belongs on the signer's machine alone"
        )
    keys = []
    try:
        for block in _PUBLIC.findall(data):
            key = serialization.load_pem_public_key(block)
            if not isinstance(key, Ed25519PublicKey):
                raise ConfigError(f"'trusted_keys': {path} holds a key that is not Ed25519")
            keys.append(key)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"'trusted_keys': {path} holds a key that is damaged") from error
    if not keys:
        raise ConfigError(f"'trusted_keys': {path} holds no public key in PEM")
    return keys


def _refuse_open(path: Path, mode: int) -> None:
    if mode & stat.S_IWOTH:
        raise ConfigError(f"'trusted_keys': everybody may change {path}: chmod o-w it first")


def _read(path: Path) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MAX_KEY_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > _MAX_KEY_BYTES:
        raise ConfigError(f"{path} is too large for a key")
    return data, mode
