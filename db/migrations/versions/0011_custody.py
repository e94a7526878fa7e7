"""SHA-256 of overlays, and the readings of the clock that retention compares.

Overlays of earlier results keep NULL: what they were when they were written is not known.
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

_INSTANT = sa.DateTime(timezone=True)


def upgrade() -> None:
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
