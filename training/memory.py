"""What a lesson has learnt besides the network, kept with the checkpoint for resuming."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lungwatch.errors import ConfigError
from lungwatch.training.data.pixels import Tensor


def save_memory(variables: Sequence[Tensor], target: Path) -> None:
    """Write the variables' values to an .npz file, whole or not at all."""
    temporary = target.with_name(f".tmp-{target.name}")
    np.savez(temporary, *(np.asarray(variable) for variable in variables))
    temporary.replace(target)


def load_memory(variables: Sequence[Tensor], source: Path) -> None:
    """Give the variables the values that `save_memory` wrote.

    Raises
    ------
    ConfigError
        If the file is missing or was written for other variables.
    """
    try:
        with np.load(source) as arrays:
            values = [arrays[f"arr_{index}"] for index in range(len(variables))]
    except (FileNotFoundError, KeyError) as error:
        raise ConfigError(
            f"{source.name} does not hold what the lesson had learnt; train anew"
        ) from error
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
