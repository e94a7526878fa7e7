"""Origin of an image in more detail: its SOP class, two more dates, the device's model.

Rows from before keep NULL there: the files can be read again, the columns can't be guessed.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_COLUMNS = ("sop_class", "series_date", "acquisition_date", "manufacturer_model")


def upgrade() -> None:
    for name in _COLUMNS:
        op.add_column("image", sa.Column(name, sa.Text()))
