"""The first schema: images, models, results, arrivals."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_INSTANT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "image",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("source_name", sa.Text(), nullable=False),
        sa.Column("path", sa.Text()),
        sa.Column("received_at", _INSTANT, nullable=False),
        sa.Column("format", sa.String(16)),
        sa.Column("rows", sa.Integer()),
        sa.Column("columns", sa.Integer()),
        sa.Column("bits_stored", sa.Integer()),
        sa.Column("photometric", sa.Text()),
        sa.Column("transfer_syntax", sa.Text()),
        sa.Column("patient_id", sa.Text()),
        sa.Column("accession", sa.Text()),
        sa.Column("study_uid", sa.Text()),
        sa.Column("series_uid", sa.Text()),
        sa.Column("sop_uid", sa.Text()),
        sa.Column("modality", sa.Text()),
        sa.Column("body_part", sa.Text()),
        sa.Column("view_position", sa.Text()),
        sa.Column("study_date", sa.Text()),
        sa.Column("manufacturer", sa.Text()),
        sa.Column("station", sa.Text()),
        sa.Column("institution", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_image"),
        sa.UniqueConstraint("sha256", name="uq_image_sha256"),
    )
    op.create_index("ix_image_received_at", "image", ["received_at"])
    op.create_index("ix_image_patient_id", "image", ["patient_id"])
    op.create_index("ix_image_accession", "image", ["accession"])
    op.create_index("ix_image_study_uid", "image", ["study_uid"])
    op.create_table(
        "model",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("contract", sa.Text(), nullable=False),
        sa.Column("first_used_at", _INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_model"),
        sa.UniqueConstraint("sha256", name="uq_model_sha256"),
    )
    op.create_table(
        "result",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("image_id", sa.Integer(), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(64)),
        sa.Column("message", sa.Text()),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("label", sa.String(16)),
        sa.Column("probability", sa.Double()),
        sa.Column("logit", sa.Double()),
        sa.Column("threshold", sa.Double()),
        sa.Column("flags", sa.JSON(), nullable=False),
        sa.Column("overlay", sa.Text()),
        sa.Column("claimed_at", _INSTANT),
        sa.Column("finished_at", _INSTANT),
        sa.Column("duration_ms", sa.Integer()),
        sa.PrimaryKeyConstraint("id", name="pk_result"),
        sa.ForeignKeyConstraint(["image_id"], ["image.id"], name="fk_result_image_id_image"),
        sa.ForeignKeyConstraint(["model_id"], ["model.id"], name="fk_result_model_id_model"),
        sa.UniqueConstraint("image_id", "model_id", name="uq_result_image_id_model_id"),
    )
    op.create_index("ix_result_state", "result", ["state"])
    op.create_index("ix_result_finished_at", "result", ["finished_at"])
    op.create_table(
        "arrival",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("token", sa.String(128), nullable=False),
        sa.Column("image_id", sa.Integer(), nullable=False),
        sa.Column("result_id", sa.Integer(), nullable=False),
        sa.Column("source_name", sa.Text(), nullable=False),
        sa.Column("arrived_at", _INSTANT, nullable=False),
        sa.Column("duplicate", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_arrival"),
        sa.ForeignKeyConstraint(["image_id"], ["image.id"], name="fk_arrival_image_id_image"),
        sa.ForeignKeyConstraint(["result_id"], ["result.id"], name="fk_arrival_result_id_result"),
        sa.UniqueConstraint("token", name="uq_arrival_token"),
    )
    op.create_index("ix_arrival_result_id", "arrival", ["result_id"])
