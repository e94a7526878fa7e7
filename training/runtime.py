"""TensorFlow, made reproducible, or one line that says which extra brings it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lungwatch.errors import MissingExtraError


def prepare_tensorflow(seed: int | None = None) -> None:
    """Import TensorFlow quietly and, with a seed, make it repeat itself bit for bit.

    Raises
    ------
    MissingExtraError
        If TensorFlow is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        with _silent_stderr():
            import keras
            import tensorflow as tf
    except ImportError as error:
        raise MissingExtraError("training", "train") from error
    if seed is not None:
        keras.utils.set_random_seed(seed)
        tf.config.experimental.enable_op_determinism()


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    # TensorFlow's C++ side writes start-up notes to the descriptor itself, before it has
    # read its own log level; stderr belongs to progress and errors.
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
