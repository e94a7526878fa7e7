"""Embedding of images: the numbers that a network's head is given."""

import math
from typing import Protocol, runtime_checkable

import numpy as np

from lungwatch.contract import EMBEDDING, INPUT
from lungwatch.errors import ModelError
from lungwatch.training.head import POOLED
from lungwatch.training.pixels import FloatArray
from lungwatch.training.scorers import KerasScorer, OnnxScorer, Scorer

_BATCH = 64


@runtime_checkable
class Embedder(Protocol):
    """A scorer that gives embeddings by itself."""

    def embeddings(self, pixels: FloatArray) -> FloatArray:
        """Return the embedding, float32 (N, E), of preprocessed images (N, S, S, 1)."""


def embed(scorer: Scorer, pixels: FloatArray) -> FloatArray:
    """Return the embedding of each image.

    Parameters
    ----------
    scorer
        A run's network, an exported graph, or an `Embedder`.
    pixels
        float32, shape (N, S, S, 1), 0..1, preprocessed.

    Returns
    -------
    numpy.ndarray
        float32, shape (N, E).

    Raises
    ------
    ModelError
        If the network has no layer that pools its last feature map.
    """
    if isinstance(scorer, OnnxScorer):
        batches = np.array_split(pixels, max(1, math.ceil(len(pixels) / _BATCH)))
        found = [scorer.session.run([EMBEDDING], {INPUT: batch})[0] for batch in batches]
        return np.concatenate(found).astype(np.float32)
    if isinstance(scorer, KerasScorer):
        return _of_keras(scorer, pixels)
    if isinstance(scorer, Embedder):
        return scorer.embeddings(pixels)
    raise ModelError(f"{scorer.judgement.name} gives no embedding")


def _of_keras(scorer: KerasScorer, pixels: FloatArray) -> FloatArray:
    import keras

    model = scorer.model
    if POOLED not in {layer.name for layer in model.layers}:
        raise ModelError(f"{scorer.judgement.name} has no layer named {POOLED!r}: no embedding")
    pooled = keras.Model(model.input, model.get_layer(POOLED).output)
    return np.asarray(pooled.predict(pixels, batch_size=_BATCH, verbose=0), np.float32)
