"""The findings of a result: each one's calibrated probability, by name.

Older rows were scored for COVID alone, and theirs is the probability that they hold.
"""

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from alembic import op

if TYPE_CHECKING:
    AnySelect = sa.Select[*tuple[Any, ...]]

revision = "0007"
down_revision = "0006"

_COVID = "covid"
_AT_ONCE = 10_000

_RESULT = sa.table(
    "result",
    sa.column("id", sa.Integer),
    sa.column("probability", sa.Double),
    sa.column("findings", sa.JSON(none_as_null=True)),
)


def upgrade() -> None:
    op.add_column("result", sa.Column("findings", sa.JSON()))
    connection, last = op.get_bind(), -1
    # Written here, since no two databases print a number alike.
    change = (
        sa.update(_RESULT)
        .where(_RESULT.c.id == sa.bindparam("row"))
        .values(findings=sa.bindparam("told"))
    )
    while rows := connection.execute(_scored_after(last)).all():
        connection.execute(
            change, [{"row": row.id, "told": {_COVID: row.probability}} for row in rows]
        )
        last = rows[-1].id


def downgrade() -> None:
    op.drop_column("result", "findings")


def _scored_after(last: int) -> "AnySelect":
    return (
        sa.select(_RESULT.c.id, _RESULT.c.probability)
        .where(_RESULT.c.id > last, _RESULT.c.probability.is_not(None))
        .order_by(_RESULT.c.id)
        .limit(_AT_ONCE)
    )
