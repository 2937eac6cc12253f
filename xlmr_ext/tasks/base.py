"""What a task is to the training loop: labels, features of its data, a loss and an evaluation.

A task's module says what its examples are; :func:`xlmr_ext.training.finetune` trains any of them.
What runs a model over many sequences without a gradient is in :mod:`xlmr_ext.prediction`:
``in_eval_mode``, ``packed_batches``, ``check_finite``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from xlmr_ext.prediction import check_max_length, label_names
from xlmr_ext.tasks.registry import read_data
from xlmr_ext.tasks.weighting import LabelWeighting

if TYPE_CHECKING:
    from xlmr_ext.packing import PackedBatch
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tokenization import XLMRobertaTokenizer


@dataclass
class Features:
    """Examples as token ids. Row r of example e is ``sequences[e * rows_per_example + r]``.

    A task subclasses it to carry what its evaluation needs (offsets, contexts, words).

    Args:
        sequences: token ids of every row, special tokens included and no padding. During
            training they may be rows of a smaller embedding table (see
            :class:`xlmr_ext.optim.NarrowVocabulary`), so nothing may read them as tokens.
        targets: one an example: whatever ``Task.loss`` takes.
        rows_per_example: 1, or the number of choices of multiple choice.
        places: gives ``file:line`` of an example by its number; None where nobody knows.
    """

    sequences: Sequence[Sequence[int]]
    targets: Sequence[Any]
    rows_per_example: int = 1
    places: Callable[[int], str] | None = None

    def __post_init__(self) -> None:
        if len(self.sequences) != len(self.targets) * self.rows_per_example:
            raise ValueError(
                f"features have {len(self.sequences)} sequences for {len(self.targets)} examples "
                f"of {self.rows_per_example} rows each"
            )

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.targets)

    def where(self, example: int) -> str:
        """What messages call an example."""
        return f"example {example + 1}" if self.places is None else self.places(example)

    def rows(self, examples: Sequence[int]) -> list[int]:
        """The rows of these examples, in order."""
        each = self.rows_per_example
        return [example * each + row for example in examples for row in range(each)]

    def lengths(self) -> list[int]:
        """Tokens of each example, all its rows together."""
        each = self.rows_per_example
        return [
            sum(map(len, self.sequences[first : first + each]))
            for first in range(0, len(self.sequences), each)
        ]


@dataclass(frozen=True)
class Scores:
    """An evaluation.

    Args:
        metrics: figures by name, in the order in which they are shown: ``loss`` in nats; shares
            (``accuracy``, ``f1``, ``exact_match``, ...) from 0 to 1.
        key: compared to choose the best epoch; higher is better.
        details: what a report needs beyond the metrics, of a type of the task's own.
    """

    metrics: dict[str, float]
    key: tuple[float, ...]
    details: Any = None


class Task(ABC):
    """A task on one model: constructed as ``SomeTask(model, tokenizer, max_length=..., ...)``.

    ``finetune`` calls :meth:`load` on the data it is given, :meth:`settle` on what is to be learnt,
    then :meth:`features` on both data sets, and :meth:`loss` and :meth:`evaluate` while it trains.

    Args:
        max_length: tokens of a row, special tokens included; ValueError beyond what the model
            takes.
    """

    name: ClassVar[str]
    labels: list[str]
    weighting: LabelWeighting | None = None

    def __init__(
        self, model: PreTrainedModel, tokenizer: XLMRobertaTokenizer, *, max_length: int
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = check_max_length(model, max_length)
        self.labels = []

    def load(self, given: Any, name: str) -> Any:
        """The data of ``finetune``'s argument ``name``: a path is read by the task's reader.

        Raises:
            ValueError: there is nothing in it.
        """
        data = read_data(self.name, given) if isinstance(given, str | Path) else given
        if not len(data):
            raise ValueError(f"{name} has no rows")
        return data

    @classmethod
    def labels_in(cls, data: Any) -> list[str]:
        """The labels that the data has, in the order in which a new head numbers them.

        Empty for a task whose head has no labels. Too many of them, or too few, are a ValueError
        that names file and line: a head is made by this list.
        """
        return []

    def settle(self, train: Any) -> None:
        """Sets ``labels`` by what is to be learnt.

        A model's labels are used where they cover those of the data; a model with the default
        names ``LABEL_0`` ... is given those of the data.

        Raises:
            ValueError: the model has another number of labels than the data.
        """
        found = self.labels_in(train)
        if found:
            self.labels = settle_labels(self.model, found, str(getattr(train, "source", "train")))

    def adopt(self, data: Any) -> None:
        """Sets ``labels`` to those of the model, for data that is only evaluated."""
        self.labels = []

    @abstractmethod
    def features(self, data: Any, *, training: bool) -> Features:
        """Tokenizes data for :meth:`loss` (training) or :meth:`evaluate`.

        Raises:
            ValueError: a row that cannot be used; the message begins with ``file:line``.
        """

    @abstractmethod
    def loss(self, model: PreTrainedModel, batch: PackedBatch, targets: Sequence[Any]) -> Tensor:
        """Mean loss of a batch, a scalar; ``targets`` are those of its examples, in order."""

    def items(self, targets: Sequence[Any]) -> float:
        """What the loss of a batch is the mean over, counted: as a rule, its examples.

        The loss of several batches together is the mean of theirs, weighted by this.
        """
        labels = self.counted_labels(targets)
        if labels is None:
            return float(len(targets))
        return float(len(labels)) if self.weighting is None else self.weighting.items(labels)

    def counted_labels(self, targets: Sequence[Any]) -> Sequence[int] | None:
        """The ids of the labels that the loss is the mean over; None where a head has no labels."""
        return None

    def weigh(
        self,
        features: Features,
        *,
        label_smoothing: float,
        class_weights: Sequence[float] | str | None,
    ) -> None:
        """Sets how labels count in :meth:`loss`, see :class:`LabelWeighting`; not in
        :meth:`evaluate`.

        Args:
            features: what is to be learnt, for balanced weights.

        Raises:
            ValueError: weights that are not one for each label, or a task without labels.
        """
        self.weighting = None
        if not label_smoothing and class_weights is None:
            return
        labels = self.counted_labels(features.targets)
        if labels is None:
            raise ValueError(
                f"label_smoothing and class_weights are for classification and tokens, and the "
                f"task is {self.name}"
            )
        self.weighting = LabelWeighting.of(label_smoothing, class_weights, self.labels, labels)

    @abstractmethod
    def evaluate(self, model: PreTrainedModel, features: Features, *, batch_size: int) -> Scores:
        """Scores on the features of data made with ``training=False``.

        Runs in eval mode without autograd and leaves the model in the mode it was in.
        ArithmeticError where an answer is not finite.

        Args:
            batch_size: most examples run at once.
        """

    def guessing_loss(self, features: Features) -> float | None:
        """Mean loss in nats of the best answer that does not look at the text; None: unknown.

        A run whose training loss stays there is warned of.
        """
        return None


def settle_labels(model: PreTrainedModel, found: list[str], source: str) -> list[str]:
    """The label names by id: the model's, or ``found`` where the model's are placeholders.

    Args:
        found: the labels of the data, in the order of the ids that a new head gives them.
        source: what the message calls the data.
    """
    names = label_names(model)
    if set(found) <= set(names) or names != [f"LABEL_{i}" for i in range(len(names))]:
        return names
    numbers = [str(number) for number in range(len(names))]
    if set(found) <= set(numbers):
        chosen = numbers
    elif len(found) == len(names):
        chosen = found
    else:
        raise ValueError(
            f"{source} has {len(found)} labels and the model {len(names)}: load the "
            f"model with num_labels={len(found)}"
        )
    model.config.id2label = dict(enumerate(chosen))
    model.config.label2id = {label: index for index, label in enumerate(chosen)}
    return chosen
