"""Whose model bundles are run: anybody's, or only those that a trusted key signed."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lungwatch.bundle import BundleFiles
from lungwatch.errors import ModelError
from lungwatch.models import SHIPPED_STATEMENTS

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from lungwatch.daemon.config import Config

_WHAT_TO_DO = "sign it with `lungwatch model sign`, or add the signer's key to 'trusted_keys'"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Who answers for a bundle.

    Attributes
    ----------
    signer
        Fingerprint of the key that its signature names; None without a signature that can be
        read. It is proved only where `is_trusted` is set.
    is_shipped
        Whether its bytes and its folder's name are those that this package was released with.
    is_trusted
        Whether a trusted key made the signature, or the bundle is a shipped one.
    fault
        What is wrong with it in terms of trust; None if nothing is.
    """

    signer: str | None
    is_shipped: bool
    is_trusted: bool
    fault: str | None

    @property
    def text(self) -> str:
        """One clause for people."""
        if self.is_shipped:
            return "shipped with this package"
        if self.signer is None:
            return "not signed"
        return f"signed by {self.signer} ({'trusted' if self.is_trusted else 'not checked'})"


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What has to be true of a bundle before its model is given to onnxruntime.

    Attributes
    ----------
    keys
        Trusted public keys by their fingerprints; None: every bundle is run.
    """

    keys: "Mapping[str, Ed25519PublicKey] | None" = None

    @classmethod
    def of(cls, config: "Config") -> Self:
        """Read the keys that a configuration names.

        Raises
        ------
        ConfigError
            If `trusted_keys` is set and no keys can be had from there.
        """
        if not config.trusted_keys:
            return cls()
        # Loads the package `cryptography`, which only those pay for who set the key.
        from lungwatch.signing import load_public_keys  # noqa: PLC0415

        return cls(keys=load_public_keys(Path(config.trusted_keys).expanduser()))

    def provenance(self, files: BundleFiles) -> Provenance:
        """Tell who answers for a bundle, without judging it."""
        statement = files.statement()
        name = files.folder.absolute().name
        is_shipped = SHIPPED_STATEMENTS.get(name) == sha256(statement).hexdigest()
        signer, fault = None, None
        if files.signature is None:
            fault = "it is not signed"
        else:
            from lungwatch.signing import Signature  # noqa: PLC0415 - see above

            try:
                signature = Signature.from_bytes(files.signature)
            except ModelError as error:
                fault = str(error)
            else:
                signer = signature.fingerprint
                key = (self.keys or {}).get(signer)
                if key is None:
                    fault = f"its signer's key {signer} is not trusted"
                elif not signature.is_of(key, statement):
                    fault = "its signature is not of these files: one was altered since"
        if is_shipped:
            fault = None
        elif fault is None and name != files.id:
            # Else one signed bundle could be put in another one's place.
            fault = f"it was signed as '{files.id}', not as '{name}'"
        return Provenance(
            signer=signer, is_shipped=is_shipped, is_trusted=fault is None, fault=fault
        )

    def check(self, files: BundleFiles) -> None:
        """Refuse a bundle that nobody trusted answers for.

        Raises
        ------
        ModelError
            If there are trusted keys and none of them signed these bytes.
        """
        if self.keys is None:
            return
        found = self.provenance(files)
        if not found.is_trusted:
            raise ModelError(
                f"the model bundle {files.folder} is refused: {found.fault}; {_WHAT_TO_DO}"
            )
