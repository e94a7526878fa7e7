"""Run by Alembic: migrates on the connection, and in the transaction, that `upgrade` holds."""

from alembic import context

from lungwatch.db.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    # SQLite alters most things by making the table anew.
    render_as_batch=True,
)
context.run_migrations()
