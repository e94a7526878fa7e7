"""One binary logit as two, one per class, without changing any decision.

With z the logit of the sigmoid, (-z/2, z/2) under softmax gives the sigmoid's probability.
This is the reference for the head that Grad-CAM explains; the networks compute the same in
their graphs (`lungwatch.training.gradcam.two_logits`).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Pairs = NDArray[np.float64]


def split_logit(logits: ArrayLike) -> _Pairs:
    """Turn binary logits, shape (N,), into those of NEGATIVE and COVID, float64 (N, 2).

    Exact for every float32, subnormal ones and infinities included: halving a number loses a
    bit only at the bottom of its own format, and float64's lies far below.
    """
    half = np.asarray(logits, dtype=np.float64).ravel() / 2
    return np.stack([-half, half], axis=1)


def join_logits(pairs: ArrayLike) -> NDArray[np.float64]:
    """Turn the logits of NEGATIVE and COVID, (N, 2), back into binary ones, float64 (N,)."""
    pair = np.asarray(pairs, dtype=np.float64)
    return np.asarray(pair[:, 1] - pair[:, 0])


def softmax(pairs: ArrayLike) -> _Pairs:
    """Probabilities of NEGATIVE and COVID, float64 (N, 2), without overflow."""
    z = join_logits(pairs)
    return np.stack([np.exp(-np.logaddexp(0.0, z)), np.exp(-np.logaddexp(0.0, -z))], axis=1)


def decide(pairs: ArrayLike) -> NDArray[np.bool_]:
    """Whether COVID's logit is the larger, (N,); a tie is COVID, as z >= 0 and p >= 0.5 say.

    It is taken of the logits, as softmax keeps their order: probabilities of logits nearer to
    each other than 1e-16 are equal once they are rounded, and `argmax` takes the first of
    equals, NEGATIVE.
    """
    pair = np.asarray(pairs, dtype=np.float64)
    return np.asarray(pair[:, 1] >= pair[:, 0])
