"""From evaluations and training logs to a report folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlmr_ext.cli.console import say
from xlmr_ext.report import Group, TrainingCurve, write_report
from xlmr_ext.tasks.registry import TASKS

if TYPE_CHECKING:
    from xlmr_ext.tasks.base import Scores

# The metric that stands first.
_HEADLINES = {"classification": "accuracy", "tokens": "f1", "qa": "f1", "choice": "accuracy"}


def as_group(name: str, rows: int, scores: Scores) -> Group:
    """An evaluation as a group of a report, with what its details have."""
    from xlmr_ext.prediction import Evaluation
    from xlmr_ext.tasks.tokens import EntityEvaluation

    details = scores.details
    confusion, by_type = None, None
    if isinstance(details, Evaluation):
        confusion = details.confusion
    if isinstance(details, EntityEvaluation):
        by_type = {
            kind: (counts.gold, counts.predicted, counts.correct)
            for kind, counts in details.by_type.items()
        }
    return Group(name, rows, scores.metrics, confusion, by_type)


def make_folder(directory: Path) -> None:
    """Makes a report's folder, so that a bad one is found before the work; OSError where it is."""
    directory.mkdir(parents=True, exist_ok=True)


def report(
    directory: Path,
    *,
    title: str,
    task: str,
    groups: Sequence[Group],
    labels: Sequence[str],
    training: TrainingCurve | None,
    facts: Mapping[str, str],
) -> None:
    """Writes the folder and says where its page is."""
    headline = _HEADLINES[task]
    if any(headline not in group.metrics for group in groups):
        headline = "loss"
    write_report(
        directory,
        title=title,
        groups=groups,
        headline=headline,
        labels=labels,
        training=training,
        facts=facts,
        unit=TASKS[task].unit,
    )
    say(f"the report is {directory / 'index.html'}")


def training_curve(
    losses: Sequence[float], history: Iterable[Mapping[str, Any]]
) -> TrainingCurve | None:
    """The curve of a run from the loss of every step and the rows of its epochs; None without any.

    Raises:
        KeyError, TypeError, ValueError: they are not what a training log holds.
    """
    epochs = list(history)
    dev = [row["dev_loss"] for row in epochs if row.get("dev_loss") is not None]
    columns = [losses, [row["train_loss"] for row in epochs], dev]
    if not all(math.isfinite(value) for column in columns for value in column):
        raise ValueError("a loss of a step or an epoch is not finite")
    ends = [int(row["step"]) for row in epochs]
    if not losses or not ends:
        return None
    return TrainingCurve(losses, columns[1], ends, dev if len(dev) == len(ends) else ())


def logged_curve(folder: Path) -> TrainingCurve | None:
    """The curve of the run that left a checkpoint; None where it has no training log."""
    from xlmr_ext.saving import LOG_NAME

    path = folder / LOG_NAME
    if not path.is_file():
        return None
    try:
        log = json.loads(path.read_text("utf-8"))
        return training_curve(log["losses"], log["history"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        say(f"warning: {path} is no training log, so there is no loss curve ({error!r})")
        return None
