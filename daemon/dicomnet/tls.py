"""TLS for the listener (PS3.15 annex B: BCP 195)."""

import ssl

from lungwatch.errors import ConfigError


def server_context(certificate: str, key: str, ca: str) -> ssl.SSLContext:
    """Make the context of a server that speaks TLS 1.2 and later.

    Parameters
    ----------
    certificate, key
        Paths of PEM files; an empty key is looked for beside the certificate.
    ca
        Path of the certificates that clients' are checked against. Empty: clients need none.

    Raises
    ------
    ConfigError
        If a file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key or None)
        if ca:
            context.load_verify_locations(ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:  # which SSLError is, too
        raise ConfigError(
            f"the files of pacs_tls_… cannot be used: {error.strerror or 'unreadable'}"
        ) from error
    return context
