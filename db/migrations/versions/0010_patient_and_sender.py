"""Patient's sex and age, time of the study and sending AE title of an image.

Rows from before keep NULL there: the files can be read again, the columns cannot be guessed.
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"

_TEXTS = ("patient_sex", "patient_age", "sending_ae")


def upgrade() -> None:
    for name in _TEXTS:
        op.add_column("image", sa.Column(name, sa.Text()))
    op.add_column("image", sa.Column("study_time", sa.DateTime(timezone=True)))


def downgrade() -> None:
    for name in (*_TEXTS, "study_time"):
        op.drop_column("image", name)
