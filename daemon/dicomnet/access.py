"""Who may send."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from lungwatch.errors import ConfigError

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_LOOPBACK = ("127.0.0.0/8", "::1/128")


@dataclass(frozen=True, kw_only=True)
class AccessList:
    """The addresses that are listened to.

    Attributes
    ----------
    networks
        Any of them will do.
    """

    networks: tuple[_Network, ...]

    @classmethod
    def parse(cls, addresses: Sequence[str]) -> Self:
        """Read addresses and networks ("10.1.0.0/16"); none means this machine alone.

        Raises
        ------
        ConfigError
            If one is neither.
        """
        try:
            networks = tuple(ipaddress.ip_network(text) for text in addresses or _LOOPBACK)
        except ValueError as error:
            raise ConfigError(f"bad value for 'pacs_calling_addresses': {error}") from error
        return cls(networks=networks)

    def allows(self, address: str) -> bool:
        """Whether a client's address is in the list."""
        # An IPv4 client of an IPv6 socket comes as ::ffff:10.0.0.1; a scope follows a %.
        client = ipaddress.ip_address(address.partition("%")[0])
        mapped = getattr(client, "ipv4_mapped", None)
        return any((mapped or client) in network for network in self.networks)
