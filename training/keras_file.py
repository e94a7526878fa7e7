"""Keras networks on disk, whole or not at all."""

from pathlib import Path

from lungwatch.training.data.pixels import KerasModel


def save_keras(model: KerasModel, target: Path) -> None:
    """Write a network to a .keras file beside its place, and rename it into it."""
    # Keras chooses the format by the suffix, so the temporary file keeps it.
    temporary = target.with_name(f".tmp-{target.name}")
    model.save(temporary)
    temporary.replace(target)
