"""What a backbone is pretrained for: one question or several about the same images."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lungwatch.errors import ConfigError, DatasetError
from lungwatch.training.data.dataset import LabelledImage

IntArray = NDArray[np.int64]
TASKS = ("finding", "covid", "source")
_COVID = "COVID"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A question with a few exclusive answers.

    Attributes
    ----------
    name
        "finding": which label; "covid": COVID against the rest; "source": which collection.
    weight
        Of its cross-entropy in the loss.
    answers
        The classes, in the order of the head's outputs.
    """

    name: str
    weight: float
    answers: tuple[str, ...]

    def targets(self, samples: Sequence[LabelledImage]) -> IntArray:
        """Return each sample's answer as its number, int64, shape (N,).

        Raises
        ------
        DatasetError
            If an answer does not occur in what the task was made from.
        """
        numbers = {answer: number for number, answer in enumerate(self.answers)}
        found = [_answer(self.name, sample) for sample in samples]
        if unknown := sorted(set(found) - set(numbers)):
            raise DatasetError(
                f"task {self.name}: {', '.join(unknown)} occurs in val and not in train"
            )
        return np.array([numbers[answer] for answer in found], dtype=np.int64)


def parse_tasks(texts: Sequence[str]) -> dict[str, float]:
    """Read "finding", "covid=0.5" and the like into weights by name.

    Raises
    ------
    ConfigError
        If there is no such task, its weight is no positive number, or there is none.
    """
    weights: dict[str, float] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            weight = float(number or 1.0)
        except ValueError:
            weight = 0.0
        if name not in TASKS or not 0 < weight < float("inf"):
            raise ConfigError(f"task {text!r}: write NAME or NAME=WEIGHT, of {', '.join(TASKS)}")
        weights[name] = weight
    if not weights:
        raise ConfigError(f"no task: give one of {', '.join(TASKS)}")
    return weights


def make_tasks(weights: dict[str, float], train: Sequence[LabelledImage]) -> list[Task]:
    """Make the tasks that these images can answer.

    Raises
    ------
    DatasetError
        If a task has one answer only.
    """
    tasks = []
    for name, weight in weights.items():
        answers = tuple(sorted({_answer(name, sample) for sample in train}))
        if len(answers) < 2:
            raise DatasetError(f"task {name}: every image has the answer {answers[0]}")
        tasks.append(Task(name=name, weight=weight, answers=answers))
    return tasks


def drawing_weights(samples: Sequence[LabelledImage], power: float = 0.5) -> NDArray[np.float64]:
    """Probability of drawing each sample, float64 (N,), summing to 1.

    A group of n images of one source and label gets a share in proportion to n ** power; see
    `lungwatch.training.sampling`.
    """
    groups = [(s.source, s.label) for s in samples]
    sizes = Counter(groups)
    weights = np.array([sizes[group] ** (power - 1.0) for group in groups])
    return np.asarray(weights / weights.sum())


def _answer(task: str, sample: LabelledImage) -> str:
    if task == "covid":
        return _COVID if sample.label == _COVID else f"not {_COVID}"
    return sample.label if task == "finding" else sample.source
