"""Where results are sent: an application entity's title, host and port."""

import re
from dataclasses import dataclass

from lungwatch.errors import ConfigError

_TLS = "+tls"
# An AE title: up to 16 of the default repertoire but backslash and controls (PS3.5, 6.2).
_AE_TITLE = re.compile(r"[\x20-\x5b\x5d-\x7e]{1,16}")
_ADDRESS = re.compile(
    r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s:@\[\]]+)):(?P<port>[0-9]{1,5})"
)
_MAX_PORT = 65_535


@dataclass(frozen=True, kw_only=True)
class Destination:
    """An application entity that takes objects by C-STORE.

    Attributes
    ----------
    name
        As configured; names the destination in the database.
    ae_title
        Of the called application entity, without padding.
    tls
        Whether the connection is encrypted.
    """

    name: str
    ae_title: str
    host: str
    port: int
    tls: bool


def is_ae_title(text: str) -> bool:
    """Whether a text can be the title of an application entity."""
    return _AE_TITLE.fullmatch(text) is not None and not text.isspace()


def parse_destination(text: str) -> Destination:
    """Return the destination that ``AETITLE@host:port`` or ``AETITLE@host:port+tls`` names.

    Raises
    ------
    ConfigError
        If the text is no such thing.
    """
    tls = text.endswith(_TLS)
    ae_title, _, address = text.removesuffix(_TLS).rpartition("@")
    found = _ADDRESS.fullmatch(address)
    if not is_ae_title(ae_title) or found is None:
        raise ConfigError(
            f"{text!r} is no destination: write AETITLE@host:port, or AETITLE@host:port{_TLS}, "
            "the title of at most 16 characters"
        )
    port = int(found["port"])
    if not 1 <= port <= _MAX_PORT:
        raise ConfigError(f"{text!r} is no destination: a port is within 1..{_MAX_PORT}")
    return Destination(
        name=text, ae_title=ae_title.strip(), host=found["six"] or found["host"], port=port, tls=tls
    )
