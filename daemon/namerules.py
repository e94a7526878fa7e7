"""Rules for names in the drop folder that are not taken: litter, and files that are unfinished."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import translate

# NAS systems (Synology, QNAP, NetApp), Windows, macOS, Linux desktops, NFS and FUSE, synchronising
# programs, and the lock files of office programs.
IGNORED_NAMES = (
    "@eaDir", "@Syno*", "*@SynoEAStream", "*@SynoResource", "#recycle", "#snapshot", "@Recycle",
    "@Recently-Snapshot", ".@__thumb", "~snapshot", ".snapshot*", ".zfs",
    "$RECYCLE.BIN", "RECYCLER", "RECYCLED", "System Volume Information", "Thumbs.db", "Thumbs.db:*",
    "ehthumbs*.db", "desktop.ini", "autorun.inf",
    ".DS_Store", "._*", "__MACOSX", ".AppleDouble", ".AppleDB", ".AppleDesktop", ".fseventsd",
    ".Spotlight-*", ".TemporaryItems", ".DocumentRevisions-*", ".apdisk", ".localized",
    "Network Trash Folder", "Temporary Items", "Icon\r",
    ".Trash*", "lost+found", ".directory", ".thumbnails", ".nfs[0-9a-f]*", ".fuse_hidden*",
    ".stfolder*", ".stversions", ".sync", ".dropbox*", ".owncloudsync*", "._sync_*",
    "~$*", ".~lock.*#",
)  # fmt: skip
# Browsers, FTP and SFTP clients and servers, rsync, BitTorrent, synchronising programs, editors.
UNFINISHED_NAMES = (
    "*.part", "*.partial", "*.tmp", "*.temp", "*.crdownload", "*.download", "*.opdownload",
    "*.downloading", "*.uploading", "*.upload", "*.filepart", "*.fpart", "*.aria2", "*.!sync",
    "*.!ut", "*.!qb", "*.bc!", "*.fdmdownload", "*.inprogress", "*.in_progress", "*.incomplete",
    "*.unfinished", "*.copying", "*.writing", "*.transferring", "~syncthing~*", "*.swp", "*.swx",
    "*~",
)  # fmt: skip
# Always there: rsync, many servers and this program's own listener build files up under such names.
_HIDDEN = ".*"


class NameKind(StrEnum):
    """Why a name is not taken.

    ``litter``: another program's own file or folder, never somebody's image. ``unfinished``: a
    file that will be renamed when it is complete.
    """

    LITTER = "litter"
    UNFINISHED = "unfinished"


@dataclass(frozen=True, kw_only=True)
class NameRule:
    """The pattern that a name matches, as it is configured."""

    kind: NameKind
    pattern: str


class NameRules:
    """Tells names that are not taken, without regard to case.

    Parameters
    ----------
    ignored, unfinished
        Patterns of names of files and folders: ``*``, ``?`` and ``[...]`` as in a shell.
    """

    def __init__(
        self,
        ignored: Sequence[str] = IGNORED_NAMES,
        unfinished: Sequence[str] = UNFINISHED_NAMES,
    ) -> None:
        self._rules = [
            (re.compile(translate(pattern.casefold())), NameRule(kind=kind, pattern=pattern))
            for kind, patterns in (
                (NameKind.LITTER, ignored),
                (NameKind.UNFINISHED, (*unfinished, _HIDDEN)),
            )
            for pattern in patterns
        ]
        # One look for the many names that match nothing.
        self._any = re.compile("|".join(pattern.pattern for pattern, _ in self._rules))

    def rule_for(self, name: str) -> NameRule | None:
        """Return the first rule that a file's or folder's name matches; None if it is taken."""
        folded = name.casefold()
        if self._any.match(folded) is None:
            return None
        return next(rule for pattern, rule in self._rules if pattern.match(folded))
