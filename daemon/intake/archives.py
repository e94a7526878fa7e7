"""Zip archives in the drop folder: each member becomes a dropped file of its own.

The files are unpacked into a folder that only the daemon may write to, durably. Then the
archive's row is written (recorded, as `unpacked`, without a label), and only then is the folder
moved to where the intake finds it. After a crash before the row it is unpacked again, after a
crash behind it `resume_unpacked` completes the move: no file comes twice.
"""

import contextlib
import errno
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from lungwatch.daemon.home import Home
from lungwatch.daemon.intake.custody import OwnedFile
from lungwatch.daemon.intake.eligibility import NameKind, NameRules
from lungwatch.daemon.stage import crashpoint
from lungwatch.errors import FileRejected, LungwatchError, Reason, TransientError
from lungwatch.files import FileKind, file_kind, fsync_dir, move_atomic
from lungwatch.imaging.radiograph import ReadPolicy
from lungwatch.imaging.reader import max_file_bytes

MAX_MEMBERS = 10_000
MAX_TOTAL_BYTES = 16 * 1024**3
# Radiographs shrink to a third, black ones to a hundredth; deflate's most is a thousandth.
MAX_RATIO = 200
_CHUNK_BYTES = 1024 * 1024
_MIB = 1024 * 1024
_UNFINISHED = ".part"
_PUBLISHED = "unzipped-"
_FOLDER = re.compile(rf"{_PUBLISHED}[0-9a-f]{{16}}(-[0-9]+)?")
# Kept of a member's name besides letters and digits of every script.
_KEPT = "._-() "

_STEM_BYTES = 150
_ENDING_CHARACTERS = 12
# Archives by their format that are something else to people: office files, programs, books.
_OTHER_KINDS = {"[Content_Types].xml", "META-INF/MANIFEST.MF", "mimetype"}


class Unpacker:
    """Unpacker of archives into the drop folder of a home.

    Parameters
    ----------
    policy
        Bounds the size of a single file.
    names
        Which names the intake skips: litter is left in the archive; other members are complete,
        whatever their names.
    """

    def __init__(self, home: Home, policy: ReadPolicy, names: NameRules) -> None:
        self._home = home
        self._names = names
        self._max_file_bytes = max_file_bytes(policy)

    def unpack(self, file: OwnedFile) -> int:
        """Unpack a file if it is an archive, into a folder that the intake does not see yet.

        Returns
        -------
        int
            Number of its files; 0 if it is no archive.

        Raises
        ------
        FileRejected
            If it is an archive that cannot be unpacked.
        TransientError
            If there is not enough free space.
        OSError
            If files cannot be read or written.
        """
        if file.kind is not FileKind.ZIP:
            return 0
        finished = self._home.unpacking / file.sha256
        target = finished.with_suffix(_UNFINISHED)
        for left in (target, finished):
            shutil.rmtree(left, ignore_errors=True)
        try:
            with file.reader() as stream, zipfile.ZipFile(stream) as archive:
                members = self._members(archive, file.size_bytes)
                target.mkdir()
                name_of = MemberNames(self._names)
                for member in members:
                    self._extract(archive, member, target / name_of(member.filename))
        except (LungwatchError, MemoryError):
            shutil.rmtree(target, ignore_errors=True)
            raise
        # A parser may raise anything at all on damaged bytes: a seek to nowhere among it, and
        # bzip2's OSError, which has no number.
        except Exception as error:
            shutil.rmtree(target, ignore_errors=True)
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            raise FileRejected(
                Reason.BAD_ARCHIVE, "the zip archive is damaged, or packed in an unknown way"
            ) from error
        fsync_dir(target)
        move_atomic(target, finished)
        crashpoint("unpacked")
        return len(members)

    def publish(self, sha256: str) -> None:
        """Move the files of an archive whose row is written to where the intake finds them."""
        _publish(self._home, self._home.unpacking / sha256)

    def _members(self, archive: zipfile.ZipFile, size_bytes: int) -> list[zipfile.ZipInfo]:
        names = set(archive.namelist())
        if names & _OTHER_KINDS:
            raise FileRejected(
                Reason.NOT_AN_IMAGE,
                "the zip archive is a document or program, not a set of images",
            )
        members = [member for member in archive.infolist() if self._is_wanted(member)]
        total = sum(member.file_size for member in members)
        problem = None
        if not members:
            problem = "holds no files"
        elif any(member.flag_bits & 0x1 for member in members):
            problem = "is encrypted"
        elif len(members) > MAX_MEMBERS:
            problem = f"holds {len(members)} files, more than {MAX_MEMBERS}"
        elif max(member.file_size for member in members) > self._max_file_bytes:
            problem = f"holds a file of more than {self._max_file_bytes // _MIB} MiB"
        elif total > min(MAX_TOTAL_BYTES, MAX_RATIO * size_bytes + _MIB):
            problem = f"unpacks to {total // _MIB} MiB, more than its size makes plausible"
        if problem:
            raise FileRejected(Reason.BAD_ARCHIVE, f"the zip archive {problem}")
        if total > self._home.free_mb() * _MIB:
            raise TransientError(f"not enough space for the {total // _MIB} MiB of a zip archive")
        return members

    def _is_wanted(self, member: zipfile.ZipInfo) -> bool:
        """Tell whether a member is a file of the user's, not of another program."""
        parts = member.filename.replace("\\", "/").split("/")
        # Not `is_dir()`, which stumbles over a name of no letters.
        return bool(parts[-1]) and not any(
            part not in (".", "..") and (part.startswith(".") or self._is_litter(part))
            for part in parts
        )

    def _is_litter(self, name: str) -> bool:
        rule = self._names.rule_for(name)
        return rule is not None and rule.kind is NameKind.LITTER

    @staticmethod
    def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
        written = 0
        with archive.open(member) as source, target.open("xb") as file:
            while chunk := source.read(_CHUNK_BYTES):
                written += len(chunk)
                # The archive's directory states a smaller size.
                if written > member.file_size:
                    raise zipfile.BadZipFile
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if file_kind(target) is FileKind.ZIP:
            raise FileRejected(
                Reason.BAD_ARCHIVE, "the zip archive holds another archive; unpack it by hand"
            )


def resume_unpacked(home: Home, is_recorded: Callable[[str], bool]) -> None:
    """Complete or discard what a dead process unpacked.

    Parameters
    ----------
    is_recorded
        Tells whether the archive of a SHA-256 is recorded as unpacked. If not, the archive is
        still in `work/` and is unpacked again, or has failed.
    """
    for folder in [entry for entry in home.unpacking.iterdir() if entry.is_dir()]:
        if folder.suffix != _UNFINISHED and is_recorded(folder.name):
            _publish(home, folder)
        else:
            shutil.rmtree(folder)
    for folder in list(home.incoming.iterdir()):
        if _FOLDER.fullmatch(folder.name) and folder.is_dir():
            with contextlib.suppress(OSError):  # not empty yet
                folder.rmdir()


def leave_folder(home: Home, folder: Path) -> None:
    """Remove a folder of unpacked files once the last of them is taken."""
    if folder.parent == home.incoming and folder.name.startswith(_PUBLISHED):
        with contextlib.suppress(OSError):  # not empty yet; or the next start does it
            folder.rmdir()


def _publish(home: Home, folder: Path) -> None:
    name = _PUBLISHED + folder.name[:16]
    target = home.incoming / name
    number = 1
    while target.exists():  # unpacked before, on request, and not all taken yet
        number += 1
        target = home.incoming / f"{name}-{number}"
    move_atomic(folder, target)


class MemberNames:
    """File names derived from those of an archive's members: readable and unique.

    None is a path, hidden, longer than a file system takes, or one that the intake skips.

    Parameters
    ----------
    names
        Which names the intake skips.
    """

    def __init__(self, names: NameRules) -> None:
        self._names = names
        self._used: set[str] = set()

    def __call__(self, member: str) -> str:
        """Return the file name of a member."""
        last = member.replace("\\", "/").rsplit("/", 1)[-1]
        kept = "".join(c if c.isalnum() or c in _KEPT else "_" for c in last)
        # Not hidden, no option to some program, no name that Windows cannot have.
        path = PurePosixPath(kept.strip(" .").lstrip("-") or "file")
        ending = path.suffix if len(path.suffix) <= _ENDING_CHARACTERS else ""
        stem = _cut(path.name.removesuffix(ending))
        for begin, end in (("", ending), ("", f"{ending}_"), ("file-", ending)):
            if self._names.rule_for(f"{begin}{stem}{end}") is None:
                stem, ending = f"{begin}{stem}", end
                break
        # If a pattern matches all three, the file is skipped, and that is logged.
        name, number = f"{stem}{ending}", 1
        while name.casefold() in self._used:
            number += 1
            name = f"{stem}-{number}{ending}"
        self._used.add(name.casefold())
        return name


def _cut(stem: str) -> str:
    return stem.encode("utf-8", "replace")[:_STEM_BYTES].decode("utf-8", "ignore")
