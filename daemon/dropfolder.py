"""The drop folder as a whole: whether it is there, and is the one that is being watched."""

import errno
import os

from lungwatch.daemon.errortext import describe
from lungwatch.daemon.home import Home
from lungwatch.daemon.logs import event
from lungwatch.daemon.outage import OutageKind, Outages
from lungwatch.daemon.watcher import Watcher


class DropFolder:
    """Notices that the folder went and came back, and has the new one watched."""

    def __init__(self, home: Home, watcher: Watcher, outages: Outages) -> None:
        self._home = home
        self._watcher = watcher
        self._outages = outages
        self._watched = self._look()
        self._is_lost = False

    def is_there(self) -> bool:
        """Whether files can be taken from the folder.

        One that was put in its place since, by mounting or by making it again, is watched
        from now on.
        """
        try:
            identity = self._look()
        except OSError as error:
            self.lose(error)
            return False
        # A folder that was made again may have got its predecessor's inode.
        is_new = self._is_lost or identity != self._watched
        if self._is_lost:
            self._is_lost = False
            self._outages.end(OutageKind.DROP_FOLDER)
        if is_new:
            self._watched = identity
            self._watcher.restart()
            event("watching", observer=self._watcher.kind, why=self._watcher.why)
        return True

    def lose(self, error: OSError) -> None:
        """Note that the folder cannot be looked at."""
        if not self._is_lost:
            self._is_lost = True
            self._outages.begin(OutageKind.DROP_FOLDER, describe(error))

    def _look(self) -> tuple[int, int]:
        """Return device and inode of a folder that can be listed."""
        status = self._home.incoming.stat()
        os.scandir(self._home.incoming).close()
        if status.st_dev != self._home.work.stat().st_dev:
            # What a mount leaves bare when it goes; nothing can be moved out of it.
            raise OSError(errno.EXDEV, "it is on another file system than work/")
        return status.st_dev, status.st_ino
