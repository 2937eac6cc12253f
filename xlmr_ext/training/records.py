"""What a training run tells: a record of every evaluation or epoch, and the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xlmr_ext.tasks.base import Scores


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C while training; the message says where training stopped and what was saved."""


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of training, or, with ``eval_steps``, the steps up to one evaluation.

    Args:
        epoch: counted from 1.
        step: optimiser steps done at its end.
        train_loss: mean loss in nats over the examples since the record before, dropout on.
        learning_rate: of the last step.
        seconds: duration, evaluation included.
        dev: the task's metrics on dev data, or None without any; see
            :class:`xlmr_ext.tasks.base.Scores`.
    """

    epoch: int
    step: int
    train_loss: float
    learning_rate: float
    seconds: float
    dev: dict[str, float] | None = None

    @property
    def dev_loss(self) -> float | None:
        """Mean loss on dev data in nats."""
        return None if self.dev is None else self.dev.get("loss")

    @property
    def dev_accuracy(self) -> float | None:
        """Share of dev examples answered right, where the task counts that."""
        return None if self.dev is None else self.dev.get("accuracy")

    @property
    def dev_macro_f1(self) -> float | None:
        """Macro F1 on dev data, of a classifier."""
        return None if self.dev is None else self.dev.get("macro_f1")

    def as_row(self) -> dict[str, Any]:
        """The fields as a flat dict; a dev metric ``f1`` is ``dev_f1``."""
        row = asdict(self)
        row.update((f"dev_{name}", value) for name, value in (row.pop("dev") or {}).items())
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> EpochRecord:
        """From :meth:`as_row`."""
        dev = {name[4:]: value for name, value in row.items() if name.startswith("dev_")}
        own = {name: value for name, value in row.items() if not name.startswith("dev_")}
        return cls(**own, dev=dev or None)


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning run did.

    Args:
        history: a record of every epoch; with ``eval_steps``, of every evaluation.
        losses: loss of every step.
        best_epoch, best_step: where the weights are from that the model now has, and that were
            saved.
        at_chance: whether the run ended as good as guessing.
        labels: the model's labels by id; empty for a task without labels.
        task: the task's name.
        scores: of those weights on dev data, with details; None without dev data.
        stopped_early: whether ``early_stopping_patience`` ended the run.
        resumed_at: the step that the run went on from, 0 where it began at its beginning.
    """

    history: list[EpochRecord]
    losses: list[float]
    best_epoch: int
    best_step: int
    steps: int
    seconds: float
    at_chance: bool
    labels: list[str]
    output_dir: Path | None
    task: str
    scores: Scores | None
    stopped_early: bool = False
    resumed_at: int = 0

    @property
    def best(self) -> EpochRecord:
        """The record of the weights that were kept."""
        return next(record for record in self.history if record.step == self.best_step)
