"""Lease, overlay digests, clock readings for retention, storage commitment, logins in the audit.

The lease's row holds the database's own random identity and the daemon that works with it. It is
written at the first start; a database that no daemon has opened since has none. Overlays of
earlier results keep NULL: what they were when they were written is not known.
"""

from typing import Any

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
    op.add_column("audit", sa.Column("login", sa.Text()))
    op.add_column("audit", sa.Column("login_uid", sa.BigInteger()))
    op.add_column("audit", sa.Column("environment", sa.Text()))
    _add_commitment()


_COMMITMENT: dict[str, sa.types.TypeEngine[Any]] = {
    "sop_class_uid": sa.String(64),
    "commitment": sa.String(16),
    "commitment_uid": sa.String(64),
    "commitment_at": _INSTANT,
    "commitment_due_at": _INSTANT,
    "commitment_tries": sa.Integer(),
    "commitment_failures": sa.Integer(),
    "commitment_error": sa.Text(),
}


def _add_commitment() -> None:
    for name, kind in _COMMITMENT.items():
        op.add_column("delivery", sa.Column(name, kind))
    op.create_index("ix_delivery_commitment", "delivery", ["commitment"])
    op.create_index("ix_image_sop_uid", "image", ["sop_uid"])
    op.create_table(
        "commitment_transaction",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("transaction_uid", sa.String(64), nullable=False),
        sa.Column("destination", sa.Text(), nullable=False),
        sa.Column("requested_at", _INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_commitment_transaction"),
        sa.UniqueConstraint("transaction_uid", name="uq_commitment_transaction_transaction_uid"),
    )
    op.create_table(
        "commitment_request",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("transaction_uid", sa.String(64), nullable=False),
        sa.Column("ae_title", sa.String(16), nullable=False),
        sa.Column("instances", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", _INSTANT),
        sa.Column("error", sa.Text()),
        sa.Column("committed", sa.Integer()),
        sa.Column("created_at", _INSTANT, nullable=False),
        sa.Column("reported_at", _INSTANT),
        sa.PrimaryKeyConstraint("id", name="pk_commitment_request"),
        sa.UniqueConstraint(
            "ae_title", "transaction_uid", name="uq_commitment_request_ae_title_transaction_uid"
        ),
    )
    op.create_index("ix_commitment_request_state", "commitment_request", ["state"])


def downgrade() -> None:
    for name in ("environment", "login_uid", "login"):
        op.drop_column("audit", name)
    op.drop_table("commitment_request")
    op.drop_table("commitment_transaction")
    op.drop_index("ix_image_sop_uid", "image")
    op.drop_index("ix_delivery_commitment", "delivery")
    for name in _COMMITMENT:
        op.drop_column("delivery", name)
    op.drop_table("clock_reading")
    op.drop_column("result", "overlay_sha256")
    op.drop_table("lease")
