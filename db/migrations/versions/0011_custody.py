"""Lease on the database, SHA-256 of overlays, and the clock's readings that retention compares.

The lease's row holds the database's own random identity and the daemon that works with it. It is
written at the first start; a database that no daemon has opened since has none. Overlays of
earlier results keep NULL: what they were when they were written is not known.
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

_INSTANT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "lease",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("database_id", sa.String(36), nullable=False),
        sa.Column("counter", sa.BigInteger(), nullable=False),
        sa.Column("token", sa.String(36)),
        sa.Column("place", sa.Text()),
        sa.Column("home_inode", sa.String(24)),
        sa.Column("scope", sa.String(96)),
        sa.Column("pid", sa.Integer()),
        sa.Column("started", sa.String(24)),
    )
    op.add_column("result", sa.Column("overlay_sha256", sa.String(64)))
    op.create_table(
        "clock_reading",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", _INSTANT, nullable=False),
        sa.Column("boot_id", sa.String(36), nullable=False),
        sa.Column("boottime_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_clock_reading"),
    )


def downgrade() -> None:
    op.drop_table("clock_reading")
    op.drop_column("result", "overlay_sha256")
    op.drop_table("lease")
