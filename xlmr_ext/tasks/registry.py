"""The tasks by name, and where each lives; nothing heavy is imported until one is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tasks.base import Task
    from xlmr_ext.tokenization import XLMRobertaTokenizer


@dataclass(frozen=True)
class Entry:
    """Where a task is found.

    Args:
        task: ``module:class`` of the :class:`xlmr_ext.tasks.base.Task`.
        head: the model's class in :mod:`xlmr_ext.heads`.
        reader: ``module:function`` that reads a file of its data.
        unit: what its data has many of.
        max_length: tokens a row is cut to, unless told otherwise.
        num_labels: outputs of the head, where they are no labels of the data.
        suffixes: of files that are this task's data and no other's.
    """

    task: str
    head: str
    reader: str
    unit: str
    max_length: int
    num_labels: int | None = None
    suffixes: tuple[str, ...] = ()


TASKS = {
    "classification": Entry(
        task="xlmr_ext.tasks.classification:ClassificationTask",
        head="XLMRobertaForSequenceClassification",
        reader="xlmr_ext.data:read_labelled",
        unit="rows",
        max_length=128,
    ),
    "tokens": Entry(
        task="xlmr_ext.tasks.tokens:TokenTask",
        head="XLMRobertaForTokenClassification",
        reader="xlmr_ext.tasks.iob2:read_iob2",
        unit="sentences",
        max_length=128,
        suffixes=(".iob2", ".iob", ".bio", ".conll"),
    ),
    "qa": Entry(
        task="xlmr_ext.tasks.answers:QATask",
        head="XLMRobertaForQuestionAnswering",
        reader="xlmr_ext.tasks.squad:read_squad",
        unit="questions",
        max_length=384,
        num_labels=2,
        suffixes=(".json",),
    ),
    "choice": Entry(
        task="xlmr_ext.tasks.choice:ChoiceTask",
        head="XLMRobertaForMultipleChoice",
        reader="xlmr_ext.tasks.choice:read_choices",
        unit="questions",
        max_length=128,
    ),
}


def task_of_model(model: object) -> str:
    """The name of the task that a model's head is for; TypeError where there is none."""
    classes = {kind.__name__ for kind in type(model).__mro__}
    for name, entry in TASKS.items():
        if entry.head in classes:
            return name
    raise TypeError(
        f"model is {type(model).__name__}, which tells no task: expected one of "
        f"{', '.join(entry.head for entry in TASKS.values())}, or give the task"
    )


def task_of_file(path: str | Path) -> str:
    """The task whose data a file is, by its suffix; most suffixes are classification's."""
    suffix = Path(path).suffix.lower()
    return next(
        (name for name, entry in TASKS.items() if suffix in entry.suffixes), "classification"
    )


def task_of_architectures(names: Iterable[str] | None) -> str | None:
    """The task of a checkpoint, by the classes that its config names; None where that is none."""
    heads = {entry.head: name for name, entry in TASKS.items()}
    return next((heads[name] for name in names or () if name in heads), None)


def task_class(name: str) -> type[Task]:
    """The class of a task."""
    found: type[Task] = _found(_entry(name).task)
    return found


def head_class(name: str) -> type[PreTrainedModel]:
    """The class of the models of a task."""
    found: type[PreTrainedModel] = _found(f"xlmr_ext.heads:{_entry(name).head}")
    return found


def read_data(name: str, path: Any, **options: Any) -> Any:
    """Reads a file of a task's data; ``options`` are its reader's."""
    return _found(_entry(name).reader)(path, **options)


def make_task(
    name: str,
    model: PreTrainedModel,
    tokenizer: XLMRobertaTokenizer,
    *,
    max_length: int | None = None,
    **options: Any,
) -> Task:
    """A task on a model.

    Args:
        max_length: None takes the task's own, or what the model takes if that is less.
        **options: of the task's constructor.
    """
    from xlmr_ext.prediction import longest_input

    if max_length is None:
        max_length = min(_entry(name).max_length, longest_input(model))
    return task_class(name)(model, tokenizer, max_length=max_length, **options)


def refuse_missing(missing: Iterable[str], verdict: str, more: str = "") -> None:
    """Weights that would be random are an error, not a guess.

    Args:
        missing: the names of the weights that a checkpoint lacks; nothing happens without one.
        verdict: what the checkpoint is not, a sentence.
        more: of which kind the weights should have been.

    Raises:
        ValueError: the sentence, how many weights it lacks, and the first three.
    """
    names = sorted(missing)
    if names:
        shown = ", ".join(names[:3]) + ("" if len(names) <= 3 else ", ...")
        raise ValueError(f"{verdict}: it lacks {len(names)} weights{more}, {shown}")


def _entry(name: str) -> Entry:
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def _found(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
