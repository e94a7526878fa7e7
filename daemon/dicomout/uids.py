"""UIDs that stay the same however often an object is built, and that nothing else has."""

import hashlib
import hmac
import uuid

_ROOT = "2.25."


def stable_uid(*parts: str, key: bytes = b"") -> str:
    """Derive a UID under the arc of UUIDs (PS3.5 B.2): at most 44 characters.

    Parameters
    ----------
    parts
        What the UID stands for.
    key
        A secret, where nobody may find the parts out by trying.

    Returns
    -------
    str
        Another one for other parts or another key, but for chance in 2**122.
    """
    # Lengths keep ("ab", "c") apart from ("a", "bc").
    text = "".join(f"{len(part)}:{part}" for part in ("lungwatch", *parts))
    digest = hmac.new(key, text.encode(), hashlib.sha256).digest()
    return f"{_ROOT}{uuid.UUID(bytes=digest[:16], version=5).int}"
