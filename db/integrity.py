"""Whether a database is whole: asked before anything is built on it."""

from sqlalchemy import Engine

from lungwatch.db.engine import reading
from lungwatch.db.failures import damaged


def check_intact(engine: Engine) -> None:
    """Look at every page of a SQLite database; a server looks after its own.

    Raises
    ------
    DatabaseError
        If it is damaged; the message says what to do.
    """
    if engine.dialect.name != "sqlite":
        return
    with reading(engine) as connection:
        # quick_check reads all pages and leaves out comparing the indices' content.
        said = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    if said != "ok":
        raise damaged(engine.url)
