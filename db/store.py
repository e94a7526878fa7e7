"""Everything that writes to the database. Each method is one transaction; time is passed in."""

from collections.abc import Callable
from datetime import datetime

from sqlalchemy import select

from lungwatch.db.changes import clean, insert_if_new, update_image
from lungwatch.db.claim import Claim, ClaimKind, Drop, claim_drop
from lungwatch.db.engine import reading, writing
from lungwatch.db.results import ResultWriter
from lungwatch.db.schema import Image, Model, Result
from lungwatch.db.states import State

__all__ = ["Claim", "ClaimKind", "Store"]


class Store(ResultWriter):
    """The writing side of the record.

    Every method may raise `DatabaseError`; `DatabaseBusyError`, which is also a
    `TransientError`, where trying again may help.

    Parameters
    ----------
    outbox
        What is to be sent of each result that is done, and whereto; None for nothing.
    """

    def register_model(
        self, *, name: str, version: str, sha256: str, contract_json: str, now: datetime
    ) -> int:
        """Note that a model is in use and return its row's id; the same file has one row."""
        with writing(self._engine) as connection:
            insert_if_new(
                connection,
                Model,
                ("sha256",),
                {
                    "name": clean(name),
                    "version": clean(version),
                    "sha256": sha256,
                    "contract": contract_json,
                    "first_used_at": now,
                },
            )
            return connection.execute(select(Model.id).where(Model.sha256 == sha256)).scalar_one()

    def claim(
        self,
        *,
        token: str,
        sha256: str,
        size_bytes: int,
        source_name: str,
        path: str,
        model_id: int,
        max_attempts: int,
        now: datetime,
        exists: Callable[[str], bool],
        arrival: bool = True,
    ) -> Claim:
        """Note a dropped file and decide what is to be done with it.

        Parameters
        ----------
        token
            Names this drop, whatever happens: seen again after a crash, it counts once.
        sha256, size_bytes
            Of the file's bytes.
        source_name
            The name it was dropped under.
        path
            Where the file is now, relative to the home.
        model_id
            The model that is to score it.
        max_attempts
            Runs that may end in a crash before the file is given up.
        now
            The time, with a zone.
        exists
            Says whether a path relative to the home is there. A copy that is recorded but
            gone gives way to this one.
        arrival
            False for a file that nobody dropped (another run of one that is filed).

        Raises
        ------
        IllegalTransition
            If another process changed the result in between.
        """
        drop = Drop(
            token=token,
            sha256=sha256,
            size_bytes=size_bytes,
            source_name=source_name,
            path=path,
            model_id=model_id,
            max_attempts=max_attempts,
            now=now,
            exists=exists,
            arrival=arrival,
        )
        with writing(self._engine) as connection:
            return claim_drop(connection, drop)

    def filed_as_done(self, image_id: int) -> datetime | None:
        """Return when an image was received, if some model's result of it is done; else None."""
        statement = (
            select(Image.received_at)
            .join(Result)
            .where(Image.id == image_id, Result.state == State.DONE)
            .limit(1)
        )
        with reading(self._engine) as connection:
            return connection.scalar(statement)

    def set_path(self, *, image_id: int, path: str | None) -> None:
        """Note where an image's file is now, relative to the home; None if it is nowhere.

        Raises
        ------
        NotFoundError
            If there is no such image.
        """
        with writing(self._engine) as connection:
            update_image(connection, image_id, path=path)
