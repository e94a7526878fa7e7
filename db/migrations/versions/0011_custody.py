"""Lease on the database: its own random identity, and the daemon that works with it.

The row is written at the first start; a database that no daemon has opened since has none.
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


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


def downgrade() -> None:
    op.drop_table("lease")
