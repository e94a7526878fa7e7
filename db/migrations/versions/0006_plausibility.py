"""The uncertain band and the content gate's figures of a result; the label NEGATIVE.

The band of older rows is that of their model's contract. NORMAL becomes NEGATIVE: the model says
that it sees no COVID pattern, and nothing of other disease.
"""

import json

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

_COLUMNS = ("uncertain_from", "uncertain_to", "gate_score", "lung_area", "lung_share")


def upgrade() -> None:
    for name in _COLUMNS:
        op.add_column("result", sa.Column(name, sa.Double()))
    _rename_label("NORMAL", "NEGATIVE")
    _take_bands_from_contracts()


def downgrade() -> None:
    _rename_label("NEGATIVE", "NORMAL")
    for name in reversed(_COLUMNS):
        op.drop_column("result", name)


def _rename_label(old: str, new: str) -> None:
    change = sa.text("UPDATE result SET label = :new WHERE label = :old")
    op.get_bind().execute(change, {"old": old, "new": new})


def _take_bands_from_contracts() -> None:
    connection = op.get_bind()
    for model_id, contract in connection.execute(sa.text("SELECT id, contract FROM model")).all():
        try:
            decision = json.loads(contract)["decision"]
            band = {
                "low": float(decision["uncertain_low"]),
                "high": float(decision["uncertain_high"]),
            }
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # a row that tells no band keeps NULL
        connection.execute(
            sa.text(
                "UPDATE result SET uncertain_from = :low, uncertain_to = :high "
                "WHERE model_id = :model_id AND threshold IS NOT NULL"
            ),
            {**band, "model_id": model_id},
        )
