"""PNG and JPEG files, read as a screen shows them, and refused unless they are whole."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from lungwatch.errors import FileRejected, Reason
from lungwatch.imaging.radiograph import Radiograph, ReadPolicy
from lungwatch.imaging.reader import read_radiograph

GREY = (np.indices((100, 120)).sum(axis=0) * 255 // 218).astype(np.uint8)
GREY16 = (np.indices((100, 120)).sum(axis=0) * 65535 // 218).astype(np.uint16)
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _read(data: bytes, folder: Path, policy: ReadPolicy | None = None) -> Radiograph:
    # No extension: the content decides.
    path = folder / "picture"
    path.write_bytes(data)
    return read_radiograph(path, policy)


def _refusal(data: bytes, folder: Path, policy: ReadPolicy | None = None) -> FileRejected:
    with pytest.raises(FileRejected) as caught:
        _read(data, folder, policy)
    return caught.value


def _encode(image: NDArray[np.generic], extension: str = ".png", *settings: int) -> bytes:
    done, data = cv2.imencode(extension, image, settings)
    assert done
    return data.tobytes()


def _pillow(mode: str, kind: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(GREY).convert(mode).save(buffer, kind, **settings)
    return buffer.getvalue()


def _chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def _png(width: int, height: int, compressed: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", compressed) + _chunk(b"IEND", b"")


class TestPng:
    def test_eight_bits_are_kept_exactly(self, tmp_path: Path) -> None:
        radiograph = _read(_encode(GREY), tmp_path)
        assert (radiograph.pixels == GREY.astype(np.float32) / np.float32(255)).all()
        meta = radiograph.meta
        assert (meta.format, meta.bits_stored, meta.photometric) == ("PNG", 8, "MONOCHROME2")
        assert (meta.rows, meta.columns) == (100, 120)
        assert meta.patient_id is meta.modality is meta.transfer_syntax is None

    def test_sixteen_bits_are_kept_exactly(self, tmp_path: Path) -> None:
        radiograph = _read(_encode(GREY16), tmp_path)
        assert (radiograph.pixels == GREY16.astype(np.float32) / np.float32(65535)).all()
        assert radiograph.meta.bits_stored == 16

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
    def test_grey_in_any_colour_mode_is_the_same_grey(self, tmp_path: Path, mode: str) -> None:
        pixels = _read(_pillow(mode), tmp_path).pixels
        assert np.abs(pixels - GREY / 255).max() <= 0.5 / 255 + 1e-6

    def test_sixteen_bit_colour_is_read(self, tmp_path: Path) -> None:
        pixels = _read(_encode(np.dstack([GREY16] * 3)), tmp_path).pixels
        assert np.abs(pixels - GREY16 / 65535).max() < 2e-5

    def test_red_green_and_blue_are_not_confused(self, tmp_path: Path) -> None:
        image = np.dstack([GREY] * 3)
        image[:2, :40], image[:2, 40:80], image[:2, 80:] = (0, 0, 255), (0, 255, 0), (255, 0, 0)
        pixels = _read(_encode(image), tmp_path).pixels  # OpenCV's order is BGR
        assert pixels[0, [0, 40, 80]] == pytest.approx([0.299, 0.587, 0.114], abs=0.003)

    def test_cut_anywhere_it_is_truncated(self, tmp_path: Path) -> None:
        data = _encode(GREY)
        for length in [*range(8, 60), *range(60, len(data), 97), len(data) - 1]:
            reason = _refusal(data[:length], tmp_path).reason
            assert reason is Reason.TRUNCATED, f"{length} of {len(data)} bytes: {reason}"

    def test_a_damaged_byte_anywhere_is_found_by_the_checksums(self, tmp_path: Path) -> None:
        data = _encode(GREY)
        for position in range(8, len(data), 61):
            damaged = bytearray(data)
            damaged[position] ^= 0x10
            reason = _refusal(bytes(damaged), tmp_path).reason
            assert reason in (Reason.UNREADABLE, Reason.TRUNCATED), f"byte {position}: {reason}"

    def test_a_wrong_checksum_is_named(self, tmp_path: Path) -> None:
        data = bytearray(_encode(GREY))
        data[29] ^= 0xFF  # the header chunk's
        assert "checksum" in str(_refusal(bytes(data), tmp_path))

    @pytest.mark.parametrize("kept", [0.0, 0.5, 0.9])
    def test_half_an_image_in_a_whole_file_is_refused(self, tmp_path: Path, kept: float) -> None:
        lines = b"".join(b"\0" + line.tobytes() for line in GREY)
        assert _read(_png(120, 100, zlib.compress(lines)), tmp_path).pixels.shape == (100, 120)
        fewer = zlib.compress(lines[: int(len(lines) * kept)])
        assert _refusal(_png(120, 100, fewer), tmp_path).reason is Reason.UNREADABLE
        cut = zlib.compress(lines)
        cut = cut[: int(len(cut) * kept)]
        assert _refusal(_png(120, 100, cut), tmp_path).reason is Reason.UNREADABLE

    def test_bytes_behind_the_end_do_no_harm(self, tmp_path: Path) -> None:
        assert _read(_encode(GREY) + b"\0" * 100, tmp_path).pixels.shape == (100, 120)


class TestJpeg:
    @pytest.mark.parametrize(
        "settings", [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), (cv2.IMWRITE_JPEG_RST_INTERVAL, 4)]
    )
    def test_is_read_within_its_loss(self, tmp_path: Path, settings: tuple[int, ...]) -> None:
        radiograph = _read(_encode(GREY, ".jpg", *settings), tmp_path)
        assert np.abs(radiograph.pixels - GREY / 255).max() < 0.02
        assert radiograph.meta.format == "JPEG"

    @pytest.mark.parametrize("mode", ["RGB", "CMYK"])
    def test_colours_become_grey(self, tmp_path: Path, mode: str) -> None:
        pixels = _read(_pillow(mode, "JPEG", quality=95), tmp_path).pixels
        assert np.abs(pixels - GREY / 255).max() < 0.03

    @pytest.mark.parametrize("settings", [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)])
    def test_cut_anywhere_it_is_refused(self, tmp_path: Path, settings: tuple[int, ...]) -> None:
        data = _encode(GREY, ".jpg", *settings)
        for length in [*range(3, len(data), 23), len(data) - 2, len(data) - 1]:
            reason = _refusal(data[:length], tmp_path).reason
            assert reason is Reason.TRUNCATED, f"{length} of {len(data)} bytes: {reason}"

    def test_a_thumbnails_end_is_not_taken_for_the_images(self, tmp_path: Path) -> None:
        data = _encode(GREY, ".jpg")
        thumbnail = b"Exif\0\0" + _encode(GREY[::4, ::4], ".jpg")
        with_thumbnail = (
            data[:2] + b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + data[2:]
        )
        assert _read(with_thumbnail, tmp_path).pixels.shape == (100, 120)
        assert _refusal(with_thumbnail[:-2], tmp_path).reason is Reason.TRUNCATED

    def test_exif_does_not_turn_the_image(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # Orientation: a quarter turn
        pixels = _read(_pillow("L", "JPEG", exif=exif, quality=95), tmp_path).pixels
        assert pixels.shape == (100, 120)
        assert np.abs(pixels - GREY / 255).max() < 0.02

    def test_one_without_a_frame_is_unreadable(self, tmp_path: Path) -> None:
        data = b"\xff\xd8\xff\xe0\x00\x10" + b"\0" * 200
        assert _refusal(data, tmp_path).reason is Reason.UNREADABLE


class TestSize:
    @pytest.mark.parametrize("extension", [".png", ".jpg"])
    def test_one_too_large_is_refused(self, tmp_path: Path, extension: str) -> None:
        refusal = _refusal(_encode(GREY, extension), tmp_path, ReadPolicy(max_pixels=11_999))
        assert refusal.reason is Reason.TOO_LARGE
        assert "120x100" in str(refusal)
        whole = _read(_encode(GREY, extension), tmp_path, ReadPolicy(max_pixels=12_000))
        assert whole.pixels.size == 12_000

    def test_a_huge_header_is_refused_before_anything_is_decoded(self, tmp_path: Path) -> None:
        bomb = _png(60_000, 60_000, zlib.compress(b"\0"))
        assert _refusal(bomb, tmp_path).reason is Reason.TOO_LARGE

    def test_one_too_small_is_refused(self, tmp_path: Path) -> None:
        assert _refusal(_encode(GREY[:63]), tmp_path).reason is Reason.TOO_SMALL
        assert _read(_encode(GREY[:64, :64]), tmp_path).pixels.shape == (64, 64)

    @pytest.mark.parametrize("level", [0, 77, 255])
    def test_one_without_contrast_is_refused(self, tmp_path: Path, level: int) -> None:
        flat = np.full((100, 100), level, dtype=np.uint8)
        assert _refusal(_encode(flat), tmp_path).reason is Reason.NO_CONTRAST


class TestRecognition:
    @pytest.mark.parametrize(
        "data",
        [
            b"GIF89a" + b"\0" * 200,
            b"BM" + b"\0" * 200,
            b"II*\0" + b"\0" * 200,
            b"%PDF-1.7\n" + b"\0" * 200,
            b"PK\x03\x04" + b"\0" * 200,
            b"\0",
            b"\0" * 200,
            b"just text\n" * 30,
            b"\x89PN",
            b"\xff\xd8",
        ],
    )
    def test_anything_else_is_not_an_image(self, tmp_path: Path, data: bytes) -> None:
        assert _refusal(data, tmp_path).reason is Reason.NOT_AN_IMAGE

    def test_an_empty_file_is_truncated(self, tmp_path: Path) -> None:
        assert _refusal(b"", tmp_path).reason is Reason.TRUNCATED

    def test_a_missing_file_is_no_rejection(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            read_radiograph(tmp_path / "missing.png")
