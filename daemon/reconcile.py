"""Reconciliation of folders and database, file by file."""

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sqlalchemy import Engine

from lungwatch.daemon.home import Home
from lungwatch.daemon.intake.claims import is_own_object
from lungwatch.daemon.pacs.outbox import stray_files
from lungwatch.db.models import State
from lungwatch.db.queries import TrackedFile, iter_all
from lungwatch.errors import Reason
from lungwatch.files import move_atomic

_CHUNK_BYTES = 1 << 20
# File systems take 255 bytes; eight digits and a hyphen precede an unknown file's name.
_NAME_BYTES = 240
_HOW = "run `lungwatch reconcile` without --dry-run while no daemon runs"
_ENDS = {State.DONE, State.REJECTED, State.FAILED}


class DiscrepancyKind(StrEnum):
    """Kind of difference between folders and database."""

    MISSING_FILE = "missing_file"
    WRONG_CONTENT = "wrong_content"
    WRONG_PLACE = "wrong_place"
    UNKNOWN_FILE = "unknown_file"
    EXTRA_COPY = "extra_copy"
    WRONG_OVERLAY = "wrong_overlay"
    MISSING_OVERLAY = "missing_overlay"
    UNKNOWN_OVERLAY = "unknown_overlay"
    UNFINISHED = "unfinished"
    LEFT_IN_WORK = "left_in_work"
    UNKNOWN_OBJECT = "unknown_object"


@dataclass(frozen=True, kw_only=True)
class Discrepancy:
    """One difference between folders and database.

    Attributes
    ----------
    path
        Relative to the home; None where only a row is concerned.
    mended
        Whether this run put it right.
    remedy
        What it did, or what a person can do.
    """

    kind: DiscrepancyKind
    result_id: int | None = None
    sha256: str | None = None
    path: str | None = None
    mended: bool = False
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Reconciliation:
    """Findings of a reconciliation.

    Attributes
    ----------
    results, files, overlays
        How many were compared.
    in_flight
        Rows on their way while a daemon is running; no difference.
    """

    results: int
    files: int
    overlays: int
    in_flight: int
    differences: tuple[Discrepancy, ...]

    @property
    def agrees(self) -> bool:
        """True if folders and database agree now."""
        return all(difference.mended for difference in self.differences)


class Reconciler:
    """Compares every row with its file, and every file with its row.

    Parameters
    ----------
    mend
        Repair what needs no guessing. Only while no daemon runs.
    is_running
        A daemon holds the home: rows and files on their way are no differences then.
    on_file
        Called after each file that was hashed, for a progress bar.
    """

    def __init__(
        self,
        home: Home,
        engine: Engine,
        *,
        mend: bool,
        is_running: bool,
        on_file: Callable[[], None] = lambda: None,
    ) -> None:
        self._home = home
        self._engine = engine
        self._mend = mend
        self._is_running = is_running
        self._on_file = on_file

    def run(self) -> Reconciliation:
        """Compare, and repair if asked to."""
        rows = list(iter_all(self._engine))
        moving = [row for row in rows if _is_moving(row)]
        digests = {path: _sha256(path, self._on_file) for path in self._kept_files()}
        overlays = set(_files(self._home.overlays))
        differences = [
            *self._check_rows(rows, digests),
            *self._check_files(rows, digests),
            *self._check_overlays(rows, overlays),
        ]
        if not self._is_running:
            differences += self._check_work(moving)
            differences += self._check_outbox()
        return Reconciliation(
            results=len(rows),
            files=len(digests),
            overlays=len(overlays),
            in_flight=len(moving) if self._is_running else 0,
            differences=tuple(differences),
        )

    def _kept_files(self) -> Iterator[Path]:
        yield from _files(self._home.done)
        yield from _files(self._home.quarantine)

    def _check_rows(
        self, rows: list[TrackedFile], digests: dict[Path, str | None]
    ) -> Iterator[Discrepancy]:
        for row in rows:
            if _is_moving(row) or row.reason == Reason.FILE_VANISHED:
                continue
            if row.path is None and row.removed_at is not None:
                continue
            path = self._home.absolute(row.path or "")
            folder = self._home.done if row.state is State.DONE else self._home.quarantine
            if path not in digests:
                yield self._row_difference(
                    DiscrepancyKind.MISSING_FILE,
                    row,
                    "restore it from a backup, or drop the original again",
                )
            elif digests[path] != row.sha256:
                yield self._row_difference(
                    DiscrepancyKind.WRONG_CONTENT, row, "its bytes changed; restore the original"
                )
            elif not path.is_relative_to(folder) and not _shared(row, rows):
                yield self._row_difference(
                    DiscrepancyKind.WRONG_PLACE, row, f"the row says {row.state}"
                )

    def _check_files(
        self, rows: list[TrackedFile], digests: dict[Path, str | None]
    ) -> Iterator[Discrepancy]:
        places = {row.path for row in rows}
        kept = {row.sha256 for row in rows if row.path and self._home.exists(row.path)}
        # A crash may have come between the change of the row and the removal of the file.
        removed = {row.sha256 for row in rows if row.path is None and row.removed_at is not None}
        for path, digest in digests.items():
            relative = self._home.relative(path)
            if relative in places or self._is_own_object(path, digest):
                continue
            if self._is_running and digest in {row.sha256 for row in rows}:
                continue
            if digest in kept:
                reason = "a second copy of a filed content"
                yield self._removed(DiscrepancyKind.EXTRA_COPY, path, reason, digest)
            elif digest in removed and path.name.startswith(str(digest)):
                reason = "kept long enough"
                yield self._removed(DiscrepancyKind.EXTRA_COPY, path, reason, digest)
            else:
                yield self._put_back(path, digest)

    def _removed(
        self, kind: DiscrepancyKind, path: Path, reason: str, sha256: str | None = None
    ) -> Discrepancy:
        """Remove a file if asked to repair."""
        if self._mend:
            path.unlink()
        return Discrepancy(
            kind=kind,
            sha256=sha256,
            path=self._home.relative(path),
            mended=self._mend,
            remedy=f"{reason}; removed" if self._mend else _HOW,
        )

    def _put_back(self, path: Path, sha256: str | None) -> Discrepancy:
        """Move a file that no row names into the drop folder if asked to repair."""
        if self._mend:
            # Unique, since two unknown files may have one name.
            name = f"{uuid.uuid4().hex[:8]}-".encode() + os.fsencode(path.name)[-_NAME_BYTES:]
            move_atomic(path, self._home.incoming / os.fsdecode(name))
        return Discrepancy(
            kind=DiscrepancyKind.UNKNOWN_FILE,
            sha256=sha256,
            path=self._home.relative(path),
            mended=self._mend,
            remedy="no row names it; put back into incoming/" if self._mend else _HOW,
        )

    def _is_own_object(self, path: Path, digest: str | None) -> bool:
        """Return whether a file is an object of lungwatch itself, which is kept without a row."""
        return (
            digest is not None
            and path == self._home.own_object_path(digest)
            and is_own_object(path)
        )

    def _check_overlays(
        self, rows: list[TrackedFile], overlays: set[Path]
    ) -> Iterator[Discrepancy]:
        named = {self._home.absolute(row.overlay) for row in rows if row.overlay}
        recorded = {row.overlay_sha256: row.result_id for row in rows if row.overlay_sha256}
        for row in rows:
            if row.overlay is None:
                continue
            path = self._home.absolute(row.overlay)
            digest = _sha256(path, self._on_file) if path in overlays else None
            if digest is None:
                yield self._overlay_difference(DiscrepancyKind.MISSING_OVERLAY, row)
            elif row.overlay_sha256 is not None and digest != row.overlay_sha256:
                other = recorded.get(digest)
                why = "its bytes changed" if other is None else f"it is that of result {other}"
                yield self._overlay_difference(DiscrepancyKind.WRONG_OVERLAY, row, f"{why}; ")
        if self._is_running:
            return  # an overlay appears a moment before its row
        for path in sorted(overlays - named):
            yield self._removed(DiscrepancyKind.UNKNOWN_OVERLAY, path, "no row names it")

    def _check_work(self, moving: list[TrackedFile]) -> Iterator[Discrepancy]:
        remedy = "start the daemon, or `lungwatch run --once`, which continues it"
        for row in moving:
            is_filed = row.state is State.QUEUED and (row.path or "").startswith("done/")
            yield self._row_difference(
                DiscrepancyKind.UNFINISHED,
                row,
                "give `lungwatch rescore` with its model again" if is_filed else remedy,
            )
        for path in _files(self._home.work):
            # The name below work/ is the sender's own and may hold a patient's.
            folder = self._home.relative(path.parent)
            yield Discrepancy(kind=DiscrepancyKind.LEFT_IN_WORK, path=folder, remedy=remedy)

    def _check_outbox(self) -> Iterator[Discrepancy]:
        # A waiting delivery without a file is no difference: the file is built again.
        for path in stray_files(self._home, self._engine):
            reason = "no destination waits for it"
            yield self._removed(DiscrepancyKind.UNKNOWN_OBJECT, path, reason)

    def _overlay_difference(
        self, kind: DiscrepancyKind, row: TrackedFile, why: str = ""
    ) -> Discrepancy:
        return Discrepancy(
            kind=kind,
            result_id=row.result_id,
            sha256=row.sha256,
            path=row.overlay,
            remedy=f"{why}restore it from a backup",
        )

    def _row_difference(self, kind: DiscrepancyKind, row: TrackedFile, remedy: str) -> Discrepancy:
        return Discrepancy(
            kind=kind, result_id=row.result_id, sha256=row.sha256, path=row.path, remedy=remedy
        )


def _is_moving(row: TrackedFile) -> bool:
    """Return whether a file is on its way, to a result or, dropped again, back to its place."""
    is_back = row.state is State.DONE and (row.path or "").startswith("work/")
    return row.state not in _ENDS or is_back


def _shared(row: TrackedFile, rows: list[TrackedFile]) -> bool:
    """Return whether another model's row has the same content: one file, two states."""
    return any(other.image_id == row.image_id and other is not row for other in rows)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


def _sha256(path: Path, on_file: Callable[[], None]) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except FileNotFoundError:
        return None
    on_file()
    return digest.hexdigest()
