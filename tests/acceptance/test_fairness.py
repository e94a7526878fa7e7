"""One X-ray does not wait for a flood, for huge files, or for huge pictures beside it.

What is compared is the order of ends, since a busy machine takes any time for anything.
"""

import os
import struct
import time
import zlib

from tests.support.record import sha256
from tests.support.waits import wait_for

FLOOD = 300
CHUNKS, STABILITY_S = 8, 5.0


def ended_of(home, contents):
    wanted = {sha256(content) for content in contents}
    return sum(row.sha256 in wanted and row.is_settled for row in home.rows())


def test_an_xray_behind_a_flood_of_its_own_folder_ends_long_before_the_flood(make_home, picture):
    home = make_home(MIN_FREE_MB="0")
    flood = [picture(number) for number in range(FLOOD)]
    for number, content in enumerate(flood):
        home.drop(f"flood/a{number}.png", content, old=True)
    xray = picture(FLOOD)
    home.drop("flood/x.png", xray, old=True)
    with home.daemon() as daemon:
        home.wait_until_ended([xray])
        assert ended_of(home, flood) < FLOOD // 2
        home.wait_until_ended(flood)
        assert daemon.stop() == 0, daemon.log()
    home.assert_settled([*flood, xray])


def test_an_xray_beside_sparse_files_of_gigabytes_ends_before_them(make_home, picture):
    """One of no known kind is not even read; one that begins like an image has its end."""
    home = make_home(MIN_FREE_MB="0", MAX_PIXELS="10000000")
    xray = picture(1)
    unknown = home.drop("a", b"nothing known")
    os.truncate(unknown, 8 << 30)
    large = home.drop("b", picture(2))
    os.truncate(large, 3 << 29)
    home.drop("x.png", xray, old=True)
    with home.daemon() as daemon:
        home.wait_until_ended([xray])
        assert [row.sha256 for row in home.rows() if row.is_settled] == [sha256(xray)]
        wait_for(lambda: sum(row.is_settled for row in home.rows()) == 2, home.log)
        assert not large.exists()
        assert unknown.stat().st_size == 8 << 30
        assert daemon.log().count("action=left_alone") == 1
        assert "no image, and larger than" in daemon.log()
        assert daemon.stop() == 0, daemon.log()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def black(number, side_px):
    """Return a PNG of many pixels and few bytes, by number."""
    head = struct.pack(">IIBBBBB", side_px, side_px, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side_px + 1) * side_px), 1)
    parts = (b"IHDR", head), (b"tEXt", b"number\0%d" % number), (b"IDAT", rows), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_an_xray_beside_huge_pictures_does_not_wait_for_a_decoder(make_home, picture):
    home = make_home(MIN_FREE_MB="0", DECODE_WORKERS="1")
    huge = [black(number, 8000) for number in range(8)]
    for number, content in enumerate(huge):
        home.drop(f"a{number}.png", content, old=True)
    xray = picture(1)
    home.drop("x.png", xray, old=True)
    with home.daemon() as daemon:
        home.wait_until_ended([xray])
        assert ended_of(home, huge) < len(huge) // 2
        home.wait_until_ended(huge)
        assert daemon.stop() == 0, daemon.log()
    home.assert_settled([*huge, xray])


def test_a_writer_that_closes_between_chunks_is_waited_for(make_home, picture):
    home = make_home(MIN_FREE_MB="0", STABILITY_S=str(STABILITY_S))
    content = picture(1)
    with home.daemon() as daemon:
        path = home.incoming / "x.png"
        size = len(content) // CHUNKS + 1
        for begin in range(0, len(content), size):
            with path.open("ab") as file:
                file.write(content[begin : begin + size])
            time.sleep(STABILITY_S / 10)
        home.wait_until_ended([content])
        assert daemon.stop() == 0, daemon.log()
    home.assert_settled([content])
    assert home.row(content).state == "done"
