"""Deliveries to a PACS: one row a result, destination and kind of object.

Results from before were not to be sent, and get no rows; `lungwatch pacs send` adds them.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_INSTANT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "delivery",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("result_id", sa.Integer(), nullable=False),
        sa.Column("destination", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("refusals", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", _INSTANT),
        sa.Column("error", sa.Text()),
        sa.Column("sop_instance_uid", sa.String(64)),
        sa.Column("created_at", _INSTANT, nullable=False),
        sa.Column("sent_at", _INSTANT),
        sa.PrimaryKeyConstraint("id", name="pk_delivery"),
        sa.ForeignKeyConstraint(["result_id"], ["result.id"], name="fk_delivery_result_id_result"),
        sa.UniqueConstraint(
            "result_id", "destination", "kind", name="uq_delivery_result_id_destination_kind"
        ),
    )
    op.create_index("ix_delivery_state", "delivery", ["state"])
