"""Owning home of a database, target and outcome of audit events, and removal of overlays.

Earlier rows of the audit name no target, and their outcome was success.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_INSTANT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("result", sa.Column("overlay_removed_at", _INSTANT))
    op.add_column("audit", sa.Column("uid", sa.Integer()))
    op.add_column("audit", sa.Column("host", sa.Text()))
    op.add_column("audit", sa.Column("target", sa.Text()))
    op.add_column("audit", sa.Column("outcome", sa.String(16), nullable=False, server_default="ok"))
    op.create_table(
        "home",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("mark", sa.String(36), nullable=False),
        sa.Column("place", sa.Text(), nullable=False),
        sa.Column("first_used_at", _INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_home"),
    )
    if op.get_bind().dialect.name == "sqlite":
        # REPLACE removes the row in its way without asking the trigger for deletions.
        op.execute(
            "CREATE TRIGGER audit_no_replace BEFORE INSERT ON audit "
            "WHEN EXISTS (SELECT 1 FROM audit WHERE id = NEW.id) "
            "BEGIN SELECT RAISE(ABORT, 'the audit table is only added to'); END"
        )
        return
    op.execute(
        "CREATE OR REPLACE FUNCTION lungwatch_audit_only_added_to() RETURNS trigger AS "
        "$$ BEGIN RAISE EXCEPTION 'the audit table is only added to'; END $$ LANGUAGE plpgsql"
    )
    for each, change in (("ROW", "UPDATE"), ("ROW", "DELETE"), ("STATEMENT", "TRUNCATE")):
        op.execute(
            f"CREATE TRIGGER audit_no_{change.lower()} BEFORE {change} ON audit "
            f"FOR EACH {each} EXECUTE FUNCTION lungwatch_audit_only_added_to()"
        )
