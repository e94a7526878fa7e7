"""The components that a result's embedding is reduced to, for drift; older rows have none."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("result", sa.Column("components", sa.JSON()))


def downgrade() -> None:
    op.drop_column("result", "components")
