"""Messages to systemd, by the protocol of sd_notify(3)."""

import os
import socket


def notify(message: str) -> None:
    """Tell the service manager something ("READY=1"); nothing happens without one.

    Raises
    ------
    OSError
        If the manager's socket is named and cannot be written to.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # a socket in the abstract namespace
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
        connection.sendto(message.encode(), address)
