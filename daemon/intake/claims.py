"""Claims of dropped files: moved to `work/`, copied, hashed and recorded.

Lungwatch's own objects are set aside.
"""

import errno
import io
import logging
import os
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_partial, read_preamble
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from lungwatch import RESEARCH_USE_ONLY
from lungwatch.daemon.intake.archives import leave_folder
from lungwatch.daemon.intake.custody import COPY_NAME, OwnedFile, copy_of, settle_copy
from lungwatch.daemon.logs import event
from lungwatch.daemon.pipeline.filing import Filing
from lungwatch.daemon.pipeline.records import Claimed
from lungwatch.daemon.stage import Context, crashpoint
from lungwatch.db.claims import Claim, ClaimKind, Drop
from lungwatch.db.models import State
from lungwatch.errors import LungwatchError
from lungwatch.files import FileKind, fsync_dir, kind_of
from lungwatch.imaging.radiograph import text_of

_OPEN_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def open_beneath(root: Path, relative: Path, *, create: bool = False) -> Iterator[int]:
    """Open a folder below `root` without following a link on the way; yield its descriptor.

    Whoever may write to the drop folder can replace a sub-folder by a link at any moment. A path
    that was checked a moment ago would then lead out of it: the daemon's own database could be
    claimed like an X-ray, or a file be returned into the home.

    Parameters
    ----------
    root
        Trusted; may be a link itself.
    relative
        Path below it, without "..".
    create
        Whether missing folders are made.

    Raises
    ------
    FileNotFoundError
        If a part of the path is missing, a link or no folder.
    OSError
        If a folder cannot be opened or made.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in relative.parts:
            if create:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=descriptor)
            deeper = _step(part, descriptor)
            os.close(descriptor)
            descriptor = deeper
        yield descriptor
    finally:
        os.close(descriptor)


def _step(part: str, folder: int) -> int:
    if part == "..":
        raise FileNotFoundError(errno.ENOENT, "leads out of the folder")
    try:
        return os.open(part, _OPEN_FLAGS, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise FileNotFoundError(errno.ENOENT, "not a folder any more") from error
        raise


_MANUFACTURER = "lungwatch"
# Prefixes of SOP classes: every Secondary Capture and every Structured Report.
_SOP_CLASSES = ("1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.88.")
# The attributes that are checked come before pixels and content.
_MOST_BYTES = 256 * 1024
_LAST_TAG = 0x00204000  # Image Comments


def is_own_object(path: Path) -> bool:
    """Tell whether a file is a Secondary Capture or Structured Report that a lungwatch made.

    A PACS that forwards by itself sends them back. They are recognised by SOP class and by what
    every lungwatch writes into them (`lungwatch.daemon.pacs.objects`), de-identified or not. A
    file that imitates them is set aside, and nothing else.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    with path.open("rb") as file:
        return _is_own(file.read(_MOST_BYTES))


def _is_own(data: bytes) -> bool:
    """Tell the same of a file's first `_MOST_BYTES` bytes."""
    if kind_of(data) is not FileKind.DICOM:
        return False
    is_deflated = DeflatedExplicitVRLittleEndian.encode() in data[:1024]
    # A file that cannot be one is not parsed.
    if _MANUFACTURER.encode() not in data.lower() and not is_deflated:
        return False
    try:
        dataset = _inflated(data) if is_deflated else _parsed(data)
    # A parser may raise anything at all on damaged bytes; those are for the decoder.
    except Exception:
        return False
    return (text_of(dataset, "SOPClassUID") or "").startswith(_SOP_CLASSES) and _is_marked(dataset)


def _is_marked(dataset: Dataset) -> bool:
    """Tell whether one of the marks is left; a PACS or a de-identifier may remove some."""
    manufacturer = text_of(dataset, "Manufacturer") or ""
    series = text_of(dataset, "SeriesDescription") or ""
    comments = (text_of(dataset, word) or "" for word in ("ImageComments", "DerivationDescription"))
    return (
        manufacturer.casefold() == _MANUFACTURER
        or series.casefold().startswith(f"{_MANUFACTURER} ")
        or any(RESEARCH_USE_ONLY in comment for comment in comments)
    )


def _parsed(data: bytes) -> Dataset:
    return read_partial(io.BytesIO(data), stop_when=_is_past, force=True)


def _inflated(data: bytes) -> Dataset:
    file = io.BytesIO(data)
    read_preamble(file, force=True)
    read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=_is_past_meta)
    # PS3.5 A.5: the bare deflate stream of RFC 1951.
    body = zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(), _MOST_BYTES)
    return read_dataset(
        io.BytesIO(body), is_implicit_VR=False, is_little_endian=True, stop_when=_is_past
    )


def _is_past(tag: BaseTag, vr: str | None, length: int) -> bool:
    del vr, length
    return int(tag) > _LAST_TAG


def _is_past_meta(tag: BaseTag, vr: str | None, length: int) -> bool:
    del vr, length
    return tag.group != 0x0002


# Marks a claim folder whose file came from quarantine on request: no new arrival.
_RETRY_PREFIX = "retry-"
_LARGE_BYTES = 64 * 1024 * 1024


class ClaimInterrupted(LungwatchError):  # noqa: N818 - an event, which the caller interprets
    """A file was moved to `work/` and could not be claimed there.

    Parameters
    ----------
    path
        The file, for `Claimer.resume`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path


class Claimer:
    """Claims files. After a crash at any step `resume` continues the claim.

    Parameters
    ----------
    model_id
        Row of the model in use.
    is_known
        Tells whether the database has a content, by its SHA-256.
    recorded_at
        Returns the SHA-256 of the content that the database has at a path below the home, None
        if it has none there.
    """

    def __init__(
        self,
        context: Context,
        filing: Filing,
        *,
        model_id: int,
        is_known: Callable[[str], bool],
        recorded_at: Callable[[str], str | None],
    ) -> None:
        self._context = context
        self._home = context.home
        self._filing = filing
        self._model_id = model_id
        self._is_known = is_known
        self._recorded_at = recorded_at

    def take(self, path: Path) -> Claimed | None:
        """Claim a complete file of the drop folder.

        Returns
        -------
        Claimed or None
            None if the file has its end already, is gone, or was still being written to and is
            back in the drop folder.

        Raises
        ------
        OSError
            If the file cannot be moved, or is large and there is no room for a copy of it; it is
            where it was.
        ClaimInterrupted
            If it was moved, and can then not be read or filed.
        """
        name = path.relative_to(self._home.incoming)
        self._check_room(path)

        def move(target: Path) -> None:
            with open_beneath(self._home.incoming, name.parent) as folder:
                os.rename(name.name, target, src_dir_fd=folder)

        return self._enter(path, uuid.uuid4().hex, name, move)

    def _check_room(self, path: Path) -> None:
        # A small file waits for the disk as everything does; a large one must not stop the rest.
        allocated_bytes = path.lstat().st_blocks * 512
        is_large = allocated_bytes > _LARGE_BYTES
        if is_large and allocated_bytes > self._home.free_mb() * 1024 * 1024:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def retry(self, quarantined: Path, source_name: str) -> Claimed | None:
        """Claim a quarantined file whose retry was requested."""
        token = _RETRY_PREFIX + uuid.uuid4().hex
        return self._enter(quarantined, token, Path(source_name), quarantined.rename)

    def resume(self, path: Path) -> Claimed | None:
        """Continue the claim of a file in `work/`, wherever it was interrupted.

        Raises
        ------
        ClaimInterrupted
            If it cannot be read or filed.
        """
        folder = self._home.work / path.relative_to(self._home.work).parts[0]
        name = path.relative_to(folder).as_posix()
        return self._settle(path, folder.name, name, moved_from=None)

    def _enter(
        self, path: Path, token: str, name: Path, move: Callable[[Path], object]
    ) -> Claimed | None:
        target = self._home.work / token / _storable(name.name)

        def enter() -> None:
            target.parent.mkdir()
            try:
                move(target)
            except OSError:
                target.parent.rmdir()
                raise

        self._context.outages.wait_out(enter)
        return self._settle(target, token, name.as_posix(), moved_from=path.parent)

    def _settle(
        self, path: Path, token: str, source_name: str, *, moved_from: Path | None
    ) -> Claimed | None:
        """Claim a file in `work/`; if that fails it stays there."""

        def settle() -> Claimed | None:
            if moved_from is not None:
                fsync_dir(path.parent)
                fsync_dir(self._home.work)
                if moved_from.is_dir():
                    fsync_dir(moved_from)
                    leave_folder(self._home, moved_from)
                crashpoint("renamed")
            return self._claim(path, token, source_name)

        try:
            return self._context.outages.wait_out(settle)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ClaimInterrupted(path) from error

    def _claim(self, path: Path, token: str, source_name: str) -> Claimed | None:
        if path.with_name(COPY_NAME).exists():
            settle_copy(path, self._recorded_at(self._home.relative(path)))
        owned = copy_of(path)
        if owned is None:
            self._give_back(path, source_name)
            return None
        claimed = None
        try:
            crashpoint("copied")
            claimed = self._record(owned, path, token, source_name)
        finally:
            if claimed is None:
                owned.close()
        return claimed

    def _record(self, owned: OwnedFile, path: Path, token: str, source_name: str) -> Claimed | None:
        """Enter a copied file in the database; its copy takes its place only then."""
        sha256 = owned.sha256
        # What an earlier version or an interrupted claim entered in the database stays there.
        if _is_own(owned.head(_MOST_BYTES)) and not self._is_known(sha256):
            path.with_name(COPY_NAME).replace(path)
            self._filing.set_aside(sha256, path)
            event("own_object", sha256)
            return None
        relative = self._home.relative(path)
        context = self._context
        drop = Drop(
            token=token,
            sha256=sha256,
            size_bytes=owned.size_bytes,
            source_name=_storable(source_name),
            path=relative,
            model_id=self._model_id,
            max_attempts=context.config.max_attempts,
            now=context.clock.now(),
            # A copy whose bytes have changed is superseded by this one.
            exists=lambda kept: self._home.holds(kept, sha256),
            arrival=not token.startswith(_RETRY_PREFIX),
        )
        claim = context.writer.call(lambda: context.store.claim(drop))
        crashpoint("claimed")
        # Removes the original. Until this is durable both are there, and the row decides.
        path.with_name(COPY_NAME).replace(path)
        crashpoint("replaced")
        claimed = Claimed(
            result_id=claim.result_id,
            image_id=claim.image_id,
            sha256=sha256,
            path=path,
            file=owned,
            attempt=claim.attempt,
            received_at=claim.received_at,
            started_s=context.clock.monotonic(),
            redraws=claim.kind is ClaimKind.REDRAW,
        )
        if claim.kind not in {ClaimKind.RUN, ClaimKind.REDRAW}:
            self._end(claim, claimed)
            return None
        self._drop_superseded(claim, path)
        event("claimed", sha256, attempt=claim.attempt)
        return claimed

    def _end(self, claim: Claim, claimed: Claimed) -> None:
        """File a content that has its end in the database already."""
        sha256 = claimed.sha256
        match claim.kind:
            case ClaimKind.DUPLICATE:
                self._filing.discard(claimed.path)
                event("duplicate", sha256, state=claim.state)
            case ClaimKind.FILE:
                self._filing.file(claimed)
                event("filed", sha256, resumed=True)
            case ClaimKind.REFILE if claim.state is State.DONE:
                self._filing.refile(claimed)
                event("filed", sha256, resumed=True)
            case _:
                reason = claim.reason or "internal_error"
                self._filing.quarantine(claimed, reason)
                event("quarantined", sha256, level=logging.WARNING, reason=reason)

    def _drop_superseded(self, claim: Claim, path: Path) -> None:
        """Remove the quarantined copy of a content that runs again from newly dropped bytes."""
        if not claim.file_path:
            return
        old = self._home.absolute(claim.file_path)
        if old != path and old.is_relative_to(self._home.quarantine):
            old.unlink(missing_ok=True)

    def _give_back(self, path: Path, source_name: str) -> None:
        """Put a file that is still being written to back into the drop folder."""
        folder = self._home.work / path.relative_to(self._home.work).parts[0]
        name = Path(source_name)
        try:
            self._link(path, name, name.parent, folder.name[:8])
        except FileNotFoundError:  # its folder was replaced
            self._link(path, name, Path(), folder.name[:8])
        path.unlink()
        folder.rmdir()
        event("returned", "-" * 12, reason="still being written")

    def _link(self, path: Path, name: Path, folder: Path, prefix: str) -> None:
        with open_beneath(self._home.incoming, folder, create=True) as place:
            # Unlike rename, link does not replace another file of this name.
            try:
                os.link(path, name.name, dst_dir_fd=place, follow_symlinks=False)
            except FileExistsError:
                free = f"{prefix}-{name.name}"
                os.link(path, free, dst_dir_fd=place, follow_symlinks=False)
            os.fsync(place)


def _storable(name: str) -> str:
    """Return a file name without lone surrogates, which represent bytes that are not UTF-8.

    No database stores them.
    """
    return name.encode("utf-8", "replace").decode("utf-8")
