"""Foreign Keras networks: declared input and output of a network that lungwatch did not make.

A .keras file states the shapes of both, but not the meaning of the numbers. Guessing has given
wrong figures without a sign, so it is declared, and checked against what the file does state.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError, ModelError
from lungwatch.training.data.pixels import FloatArray, KerasModel, in_batches
from lungwatch.training.networks.heads import FEATURES, HIDDEN, LOGIT, further_findings

OutputKind = Literal["sigmoid", "logit", "softmax"]
DECLARE = (
    "declare it: --output sigmoid|logit|softmax:INDEX (of COVID), "
    "--input-range 0..1|0..255|-1..1|MEAN/STD, --channels 1|3"
)
_RANGES = {"0..1": (1.0, 0.0), "0..255": (255.0, 0.0), "-1..1": (2.0, -1.0)}
_ACTIVATIONS: dict[str, OutputKind] = {
    "sigmoid": "sigmoid",
    "softmax": "softmax",
    "linear": "logit",
}
_BATCH = 64
# Far enough out for every float32: the next one below 1 is 6e-8 away, the least above 0 is 1.4e-45.
_ALMOST_0, _ALMOST_1 = 1e-46, 1 - 1e-8
_SUM_ERROR = 1e-3


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """Meaning of the input and output values of a foreign network.

    Attributes
    ----------
    output
        "sigmoid": one output, the probability of COVID; "logit": one output, its logit;
        "softmax": probabilities of several classes.
    index
        Which of several classes is COVID, from 0; 0 for one output.
    input_range
        As declared, for the record.
    scale, offset
        The network's input is `scale * pixels + offset` of grey values within 0..1, one number
        for all channels or one for each.
    channels
        1, or 3 equal ones.
    """

    output: OutputKind
    index: int
    input_range: str
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    channels: int

    @classmethod
    def parse(
        cls, output: str | None, input_range: str | None, channels: int | None
    ) -> Self | None:
        """Read the three options; None if none is given.

        Raises
        ------
        ConfigError
            If one is missing or cannot be read.
        """
        given = {"--output": output, "--input-range": input_range, "--channels": channels}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return None
        if output is None or input_range is None or channels is None:
            raise ConfigError(f"{', '.join(missing)} missing: a network is declared with all three")
        kind, index = _parse_output(output)
        scale, offset = _parse_range(input_range)
        if channels not in (1, 3):
            raise ConfigError(f"--channels {channels}: 1 or 3")
        if len(scale) not in (1, channels):
            raise ConfigError(
                f"--input-range {input_range!r} has {len(scale)} channels, --channels {channels}"
            )
        return cls(
            output=kind,
            index=index,
            input_range=input_range,
            scale=scale,
            offset=offset,
            channels=channels,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what was declared, as plain values."""
        output = f"{self.output}:{self.index}" if self.output == "softmax" else self.output
        return {"output": output, "input_range": self.input_range, "channels": self.channels}

    def check(self, model: KerasModel, name: str) -> int:
        """Check the declaration against the network's own layers and shapes.

        Returns
        -------
        int
            Side of its square input, pixels.

        Raises
        ------
        ModelError
            If the network has another kind of input or output than can be declared.
        ConfigError
            If the declaration contradicts it.
        """
        if len(model.inputs) != 1 or len(model.outputs) != 1:
            raise ModelError(f"{name} has several inputs or outputs: one of each is needed")
        taken, given = tuple(model.inputs[0].shape), tuple(model.outputs[0].shape)
        if len(taken) != 4 or taken[1] is None or taken[1] != taken[2]:
            raise ModelError(f"{name} takes {taken}: square images of a fixed size are needed")
        if taken[3] != self.channels:
            raise ConfigError(f"--channels {self.channels}: {name} takes {taken[3]}")
        if len(given) != 2:
            raise ModelError(f"{name} gives {given}: one row of numbers an image is needed")
        self._check_output(int(given[1]), name)
        said = _ACTIVATIONS.get(_last_activation(model))
        if said is not None and said != self.output:
            raise ConfigError(f"--output {self.output}: the last layer of {name} gives a {said}")
        self._check_range(model, name)
        return int(taken[1])

    def _check_output(self, count: int, name: str) -> None:
        if self.output != "softmax" and count != 1:
            raise ConfigError(
                f"--output {self.output}: {name} has {count} outputs; give softmax:INDEX"
            )
        if self.output == "softmax" and not (count > 1 and self.index < count):
            raise ConfigError(
                f"--output softmax:{self.index}: {name} has {count} outputs, "
                f"{'index 0 to ' + str(count - 1) if count > 1 else 'so no softmax'}"
            )

    def _check_range(self, model: KerasModel, name: str) -> None:
        widest = max(abs(s) + abs(o) for s, o in zip(self.scale, self.offset, strict=True))
        for layer in model.layers:
            if type(layer).__name__ != "Rescaling":
                continue
            factor = float(np.max(np.abs(np.asarray(layer.scale, np.float64))))
            if factor < 1 / 64 and widest < 64:  # 1/255 or 1/127.5
                raise ConfigError(
                    f"--input-range {self.input_range}: {name} begins with a rescaling by "
                    f"{factor:.4g}, so it takes 0..255"
                )
            return

    def prepare(self, pixels: FloatArray) -> FloatArray:
        """Turn grey values, (N, S, S, 1), 0..1, into the network's input, (N, S, S, C)."""
        scale, offset = np.array(self.scale, np.float32), np.array(self.offset, np.float32)
        wide = np.repeat(pixels, self.channels, axis=3)
        return np.asarray(wide * scale + offset, dtype=np.float32)

    def logits(self, outputs: NDArray[Any], name: str) -> NDArray[np.float64]:
        """Turn a network's outputs, (N, K), into binary logits, float64 (N,).

        Probabilities keep their order, ties included, and come back to within 1e-8.

        Raises
        ------
        ModelError
            If the outputs are not what was declared.
        """
        found = np.asarray(outputs, dtype=np.float64)
        if not np.isfinite(found).all():
            raise ModelError(f"{name} answers with what is no finite number")
        if self.output == "logit":
            return np.asarray(found[:, 0])
        if found.min() < 0 or found.max() > 1 + _SUM_ERROR:
            raise ModelError(
                f"{name} answers {found.min():.4g} to {found.max():.4g}: no probabilities; "
                "declare --output logit if it has one output"
            )
        if self.output == "softmax" and np.abs(found.sum(axis=1) - 1).max() > _SUM_ERROR:
            raise ModelError(f"{name} gives probabilities that do not add up to 1: no softmax")
        p = np.clip(found[:, self.index], _ALMOST_0, _ALMOST_1)
        return np.asarray(np.log(p) - np.log1p(-p))


def foreign_outputs(
    model: KerasModel, declared: Declaration, pixels: FloatArray
) -> NDArray[np.floating]:
    """Return a foreign network's own predictions, (N, K), for pixels (N, S, S, 1), 0..1."""
    return in_batches(
        lambda part: np.asarray(model(declared.prepare(part), training=False)), pixels
    )


def has_own_head(model: KerasModel) -> bool:
    """Return whether a network maps pixels (N, S, S, 1) to a logit (N, 1) for each finding."""
    if len(model.inputs) != 1 or len(model.outputs) != 1 + len(further_findings(model)):
        return False
    names = {layer.name for layer in model.layers}
    return (
        {FEATURES, HIDDEN, LOGIT} <= names
        and len(model.inputs[0].shape) == 4
        and model.inputs[0].shape[-1] == 1
        and all(tuple(output.shape[1:]) == (1,) for output in model.outputs)
        and model.get_layer(LOGIT).activation.__name__ == "linear"
    )


def last_layer(model: KerasModel) -> Any:  # noqa: ANN401 - a Keras layer
    """Return the layer that gives a network's output."""
    return model.outputs[0]._keras_history.operation  # noqa: SLF001 - Keras has no other name


def _last_activation(model: KerasModel) -> str:
    activation = getattr(last_layer(model), "activation", None)
    if activation is None and type(last_layer(model)).__name__ == "Softmax":
        return "softmax"
    return str(getattr(activation, "__name__", ""))


def _parse_output(text: str) -> tuple[OutputKind, int]:
    if text in ("sigmoid", "logit"):
        return text, 0  # type: ignore[return-value]  # one of both, as just compared
    if found := re.fullmatch(r"softmax:(\d{1,6})", text):
        return "softmax", int(found[1])
    raise ConfigError(
        f"--output {text!r}: sigmoid, logit or softmax:INDEX, INDEX being the output of COVID"
    )


def _parse_range(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if text in _RANGES:
        scale, offset = _RANGES[text]
        return (scale,), (offset,)
    try:
        means, stds = (
            [float(word) for word in part.split(",")] for part in text.split("/", maxsplit=1)
        )
    except ValueError:
        means, stds = [], []
    right = len(means) == len(stds) > 0 and all(s > 0 for s in stds)
    if not (right and all(map(math.isfinite, [*means, *stds]))):
        raise ConfigError(
            f"--input-range {text!r}: {', '.join(_RANGES)}, or MEAN/STD of grey values within "
            "0..1, as 0.5/0.25 or 0.485,0.456,0.406/0.229,0.224,0.225"
        )
    return tuple(1 / s for s in stds), tuple(-m / s for m, s in zip(means, stds, strict=True))
