"""Deadlines of the Storage SCU: a peer that trickles, and one that stops reading."""

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from lungwatch.daemon.config import parse_destination
from lungwatch.daemon.configfile import load_config
from lungwatch.daemon.pacs import scu as module
from lungwatch.daemon.pacs.scu import StorageScu, UnreachableError
from tests.support.waits import PATIENCE_S

# The header of an A-ASSOCIATE-AC PDU of 64 KiB (PS3.8, 9.3.3).
ACCEPT_HEADER = b"\x02\x00\x00\x01\x00\x00"


@pytest.fixture
def trickling() -> Iterator[str]:
    """A peer that accepts an association one byte at a time, which takes hours."""
    ended = threading.Event()
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            connection, _ = server.accept()
            with closing(connection):
                connection.sendall(ACCEPT_HEADER)
                while not ended.wait(0.05):
                    connection.sendall(b"\0")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"TRICKLE@127.0.0.1:{server.getsockname()[1]}"
    ended.set()
    server.close()
    thread.join(PATIENCE_S)


def test_a_peer_that_trickles_is_given_up_within_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trickling: str
):
    """The library's timeout alone waits until the peer has sent the rest of its PDU."""
    monkeypatch.setattr(module, "_ACSE_S", 0.5)
    monkeypatch.setattr(module, "_ESTABLISH_S", 2.0)
    user = StorageScu(load_config(home=tmp_path, environ={}))
    said: list[str] = []

    def echo() -> None:
        try:
            user.echo(parse_destination(trickling))
        except UnreachableError as error:
            said.append(str(error))

    thread = threading.Thread(target=echo, daemon=True)
    thread.start()
    thread.join(PATIENCE_S / 2)
    assert not thread.is_alive()
    assert len(said) == 1
