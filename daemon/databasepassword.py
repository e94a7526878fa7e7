"""The database's password, from a file of its own: not in the configuration, nor in a unit."""

from pathlib import Path
from typing import TYPE_CHECKING

from lungwatch.errors import ConfigError

if TYPE_CHECKING:
    from lungwatch.daemon.config import Config


def url_with_password(config: "Config") -> str:
    """Return `database_url` with the password in it.

    Raises
    ------
    ConfigError
        If the file cannot be read or is empty, or the URL is of a database without passwords or
        holds one already.
    DatabaseError
        If the URL is not understood.
    """
    from lungwatch.db.engine import parse_url  # noqa: PLC0415 - only those pay who set the key

    url = parse_url(config.database_url)
    if url.get_backend_name() == "sqlite":
        raise ConfigError("'database_password_file': an SQLite file has no password")
    if url.password is not None:
        raise ConfigError("'database_password_file': 'database_url' holds a password already")
    try:
        password = Path(config.database_password_file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"'database_password_file' {config.database_password_file} cannot be read: {why}"
        ) from error
    # An editor ends the line; a password does not end with one.
    password = password.rstrip("\r\n")
    if not password:
        raise ConfigError(f"'database_password_file' {config.database_password_file} is empty")
    return url.set(password=password).render_as_string(hide_password=False)
