"""Fuzz targets: each takes bytes and raises if lungwatch answers them wrongly.

A refusal with a reason is a right answer, and so is an image that keeps its promises. Anything
else, a foreign exception above all, is a finding.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lungwatch.bundle import BundleFiles
from lungwatch.contract import ModelContract
from lungwatch.daemon.config import Config
from lungwatch.daemon.configfile import load_config
from lungwatch.daemon.home import Home
from lungwatch.daemon.intake.archives import Unpacker
from lungwatch.daemon.intake.custody import OwnedFile
from lungwatch.daemon.intake.eligibility import NameRules
from lungwatch.daemon.pipeline.model import BundlePolicy
from lungwatch.errors import ConfigError, FileRejected, ModelError, TransientError
from lungwatch.imaging.radiograph import ReadPolicy
from lungwatch.imaging.reader import read_radiograph
from lungwatch.signing import fingerprint

# Images of a few pixels make short inputs, which a fuzzer gets through by the thousand.
POLICY = ReadPolicy(min_side_px=1, max_pixels=1_000_000)
# Bytes of bundle.json and of bundle.sig in one input; no file that is either holds a zero.
SEPARATOR = b"\0"
MODEL = b"model"
ABOUT = json.dumps(
    {"name": "m", "version": "1", "sha256": {"model.onnx": hashlib.sha256(MODEL).hexdigest()}}
).encode()
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_MEMBERS_BYTES = 64 * 1024 * 1024


class Wrong(AssertionError):  # noqa: N818 - what it says of the answer
    """An answer that breaks a promise."""


def read(data: bytes) -> None:
    """Read a file of any format by its content, as the daemon does."""
    descriptor = os.memfd_create("input")
    try:
        os.write(descriptor, data)
        # A path that can be opened again, as often as the reader likes.
        _check(Path(f"/proc/self/fd/{descriptor}"))
    finally:
        os.close(descriptor)


def read_png(data: bytes) -> None:
    """Read a PNG whose checksums are right: else a fuzzer never gets behind them."""
    fixed, position = bytearray(_PNG), 0
    while position + 8 <= len(data):
        length = min(int.from_bytes(data[position : position + 4], "big"), len(data))
        body = data[position + 4 : position + 8 + length]
        fixed += data[position : position + 4] + body + zlib.crc32(body).to_bytes(4, "big")
        position += 12 + length
    read(bytes(fixed))


def unpack(data: bytes) -> None:
    """Unpack a zip archive: nothing may appear outside the folder meant for it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        home = Home(Path(place) / "home")
        home.prepare()
        archive = Path(place) / "archive"
        archive.write_bytes(b"PK\x03\x04" + data)
        file = OwnedFile.open(archive)
        try:
            is_unpacked = Unpacker(home, POLICY, NameRules()).unpack(file) > 0
            if not is_unpacked:
                raise Wrong("an archive passed for an image")
        except (FileRejected, TransientError):
            is_unpacked = False
        finally:
            file.close()
        found = {path for path in Path(place).rglob("*") if not path.is_dir()} - {archive}
        wanted = home.unpacking / file.sha256
        if stray := [path for path in found if path.parent != wanted or not is_unpacked]:
            raise Wrong(f"{len(stray)} files outside of the folder for them")
        if sum(path.stat().st_size for path in found) > _MOST_MEMBERS_BYTES:
            raise Wrong("a few bytes became many")


def contract(data: bytes) -> None:
    """Read a model's contract."""
    try:
        ModelContract.from_json(data.decode("utf-8", "replace"))
    except ModelError:
        return


def bundle(data: bytes) -> None:
    """Read a bundle's bundle.json and bundle.sig: none but what was signed may be trusted."""
    about, _, signature = data.partition(SEPARATOR)
    files = BundleFiles(folder=Path("/m-1"), model=MODEL, about=about, signature=signature)
    trust = BundlePolicy(keys={fingerprint(KEY.public_key()): KEY.public_key()})
    with contextlib.suppress(ModelError):
        files.check_digests()
    try:
        trust.check(files)
    except ModelError as refusal:
        if "\n" in str(refusal):
            raise Wrong("a refusal of several lines") from refusal
        return
    if about != ABOUT:
        raise Wrong("an altered bundle passed for the signed one")


def config(data: bytes) -> None:
    """Read a configuration file: a key that is understood, or one line that says which is not."""
    descriptor = os.memfd_create("lungwatch.toml")
    try:
        os.write(descriptor, data)
        found = load_config(Path(f"/proc/self/fd/{descriptor}"), environ={})
    except ConfigError:
        return
    finally:
        os.close(descriptor)
    if not isinstance(found, Config) or not 1 <= found.batch_size <= 256:
        raise Wrong("a value out of its range")


def _check(path: Path) -> None:
    try:
        radiograph = read_radiograph(path, POLICY)
    except FileRejected as refusal:
        if "\n" in str(refusal):
            raise Wrong("a refusal of several lines") from refusal
        return
    pixels = radiograph.pixels
    if pixels.dtype != np.float32 or pixels.ndim != 2:
        raise Wrong(f"pixels of type {pixels.dtype} and shape {pixels.shape}")
    if not (np.isfinite(pixels).all() and pixels.min() >= 0.0 and pixels.max() <= 1.0):
        raise Wrong("pixels beyond 0..1")


TARGETS: dict[str, Callable[[bytes], None]] = {
    "dicom": read,
    "jpeg": read,
    "png": read_png,
    "zip": unpack,
    "contract": contract,
    "bundle": bundle,
    "config": config,
}
