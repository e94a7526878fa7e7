"""The site calibration that decided a result; NULL where the bundle's own did."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("result", sa.Column("calibration", sa.String(64)))


def downgrade() -> None:
    op.drop_column("result", "calibration")
