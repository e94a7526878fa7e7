"""Cross-field validation of the configuration."""

from typing import TYPE_CHECKING

from lungwatch.daemon.outbox.destination import is_ae_title, parse_destination
from lungwatch.errors import ConfigError

if TYPE_CHECKING:
    from lungwatch.daemon.config import Config

OBJECT_KINDS = ("sc", "sr")


def check_names(config: "Config") -> None:
    """Refuse a pattern with which nothing would ever be taken.

    Raises
    ------
    ConfigError
        If there is one.
    """
    for key in ("ignored_names", "unfinished_names"):
        for pattern in getattr(config, key):
            if not pattern.strip("*"):
                raise ConfigError(f"bad value for '{key}': {pattern!r} matches every name, or none")


def check_receiving(config: "Config") -> None:
    """Refuse a port that is open to a network from which nobody may send.

    Raises
    ------
    ConfigError
        If it is.
    """
    if not config.pacs_port or config.pacs_calling_addresses:
        return
    if config.pacs_address not in ("127.0.0.1", "::1", "localhost"):
        raise ConfigError(
            f"'pacs_address' {config.pacs_address} is open to the network: name who may send in "
            "'pacs_calling_addresses'"
        )


def check_sending(config: "Config") -> None:
    """Refuse what can be told of the destinations before one of them is asked.

    Raises
    ------
    ConfigError
        For a bad title, destination or kind of object, or a pseudonym without its key.
    """
    if not is_ae_title(config.pacs_ae_title):
        raise ConfigError(
            f"bad value for 'pacs_ae_title': {config.pacs_ae_title!r} is not of 1 to 16 characters"
        )
    for text in config.pacs_destinations:
        try:
            parse_destination(text)
        except ConfigError as error:
            raise ConfigError(f"bad value for 'pacs_destinations': {error}") from error
    if len(set(config.pacs_destinations)) < len(config.pacs_destinations):
        raise ConfigError("bad value for 'pacs_destinations': one is named twice")
    kinds = config.pacs_send
    if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(OBJECT_KINDS):
        raise ConfigError(
            f"bad value for 'pacs_send': {list(kinds)!r} is not of sc and sr, each once"
        )
    if config.pacs_deidentify and not config.pacs_deidentify_key:
        raise ConfigError(
            "'pacs_deidentify' needs 'pacs_deidentify_key', the path of a file with a secret: "
            "make one with `head -c 32 /dev/urandom > FILE; chmod 600 FILE`"
        )
    if config.pacs_retry_max_s < config.pacs_retry_s:
        raise ConfigError("'pacs_retry_max_s' is less than 'pacs_retry_s'")
