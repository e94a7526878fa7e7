"""Corpus of the fuzzer: inputs that reached new code, kept in one small file between runs."""

import zipfile
from pathlib import Path

PACKED = Path(__file__).with_name("corpus.zip")
FOLDER = Path(__file__).with_name("corpus")
_MOST_A_TARGET = 200


def unpack() -> None:
    """Lay out what was kept, beside what is there."""
    if PACKED.is_file():
        with zipfile.ZipFile(PACKED) as archive:
            archive.extractall(FOLDER)


def pack() -> None:
    """Keep the shortest inputs of each target; equal folders make equal files."""
    with zipfile.ZipFile(PACKED, "w", zipfile.ZIP_DEFLATED) as archive:
        for target in sorted(path for path in FOLDER.iterdir() if path.is_dir()):
            files = sorted(target.iterdir(), key=lambda path: (path.stat().st_size, path.name))
            for path in files[:_MOST_A_TARGET]:
                # Without the time, which would make another file of it every time.
                entry = zipfile.ZipInfo(f"{target.name}/{path.name}")
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, path.read_bytes())
