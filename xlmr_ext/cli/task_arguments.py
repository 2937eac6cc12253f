"""What the commands that work on any task share: --task, each task's options, data and model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from xlmr_ext.cli.arguments import PROGRAM, add_columns, count, count_or_zero
from xlmr_ext.cli.console import hub, input_format, to_run
from xlmr_ext.report import metric_title
from xlmr_ext.tasks.registry import TASKS, refuse_missing, task_of_architectures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from xlmr_ext.pretrained import PreTrainedModel
    from xlmr_ext.tokenization import XLMRobertaTokenizer


class _Option(NamedTuple):
    """An option of one task: an argument of its reader or of its constructor."""

    of_reader: bool
    help: str
    kind: Callable[[str], Any] | None = count
    choices: Sequence[str] | None = None


# By the argument's name.
_OPTIONS: dict[str, dict[str, _Option]] = {
    "tokens": {
        "token_column": _Option(True, "column of the words, from 1 (default: told by the file)"),
        "tag_column": _Option(True, "column of the tags, from 1 (default: told by the file)"),
        "errors": _Option(
            True,
            "tags that are not IOB2 are an error, or are turned into it (default: strict)",
            None,
            ("strict", "repair"),
        ),
        "stride": _Option(
            False,
            "tokens that two windows share (default: a quarter of --max-length)",
            count_or_zero,
        ),
    },
    "qa": {
        "doc_stride": _Option(
            False, "tokens that two windows of a context share (default: 128)", count_or_zero
        ),
        "max_answer_length": _Option(False, "tokens of the longest answer (default: 30)"),
    },
}
_FLAGS = {"errors": "tag_errors"}
_COLUMNS = ("text_column", "pair_column", "label_column", "input_format", "encoding_errors")


def add_task(parser: argparse.ArgumentParser, group: Any, default: str) -> None:
    """--task into ``group``, and a group for each task that has options.

    Args:
        default: what decides the task where it is not given.
    """
    add_task_name(group, default)
    add_columns(parser.add_argument_group("--task classification"), label_default="label")
    for task, options in _OPTIONS.items():
        own = parser.add_argument_group(f"--task {task}")
        for name in options:
            add_option(own, task, name)


def add_option(group: Any, task: str, name: str) -> None:
    """One of the options that only this task has."""
    option = _OPTIONS[task][name]
    more: dict[str, Any] = (
        {"metavar": "N", "type": option.kind}
        if option.choices is None
        else {"choices": option.choices}
    )
    group.add_argument(_flag(name), help=option.help, **more)


def add_task_name(group: Any, default: str) -> None:
    group.add_argument(
        "--task", choices=tuple(TASKS), help=f"what the model is for (default: {default})"
    )


def task_of_checkpoint(arguments: argparse.Namespace) -> str:
    """--task, or the task that the head of --model is for; one without is to be a classifier."""
    if arguments.task is not None:
        return str(arguments.task)
    from xlmr_ext import XLMRobertaConfig

    config = XLMRobertaConfig.from_pretrained(arguments.model, **hub(arguments))
    return task_of_architectures(config.architectures) or "classification"


def check_options(arguments: argparse.Namespace, task: str) -> None:
    """Bad usage (exit code 2) where an option of `add_task` was given that is another task's."""
    owners = dict.fromkeys(_COLUMNS, ("classification",))
    for name, options in _OPTIONS.items():
        owners |= {_FLAGS.get(option, option): (name,) for option in options}
    refuse_others(arguments, task, owners)


def refuse_others(
    arguments: argparse.Namespace, task: str, owners: Mapping[str, Sequence[str]]
) -> None:
    """Bad usage where an option has a value and ``task`` is none of its tasks.

    Args:
        owners: the tasks of each option, by its name in ``arguments``.
    """
    parser: argparse.ArgumentParser = arguments.parser
    for dest, tasks in owners.items():
        if task not in tasks and getattr(arguments, dest) != parser.get_default(dest):
            parser.error(
                f"{_flag(dest)} is an option of --task {' and '.join(tasks)}, and this is {task}"
            )


def check_format(arguments: argparse.Namespace, task: str, path: Path) -> None:
    """Bad usage (exit code 2) where the format of a classifier's file cannot be told."""
    if task == "classification":
        input_format(arguments, str(path))


def refuse_stdin(arguments: argparse.Namespace, paths: Iterable[Path]) -> None:
    """Bad usage (exit code 2) where a file that is read as a whole is -, standard input."""
    if Path("-") in paths:
        arguments.parser.error("standard input cannot be read here: give a file")


def read_task_data(arguments: argparse.Namespace, task: str, path: Path) -> Any:
    """The data of a file, by the task's reader and its options; ValueError where it is empty."""
    from xlmr_ext.tasks.registry import read_data

    if task == "classification":
        return read_data(
            task,
            path,
            format=input_format(arguments, str(path)),
            text_column=arguments.text_column,
            pair_column=arguments.pair_column,
            label_column=arguments.label_column,
            errors=arguments.encoding_errors,
        )
    data = read_data(task, path, **_given(arguments, task, of_reader=True))
    if not len(data):
        raise ValueError(f"{path} has no rows")
    return data


def task_options(arguments: argparse.Namespace, task: str) -> dict[str, Any]:
    """The arguments of the task's constructor that were given."""
    return _given(arguments, task, of_reader=False)


def load_to_train(
    arguments: argparse.Namespace, task: str, labels: list[str]
) -> tuple[PreTrainedModel, XLMRobertaTokenizer, bool]:
    """The model, the tokenizer, and whether the model's head starts anew.

    Args:
        labels: of the data, in the order of the ids of a new head; empty where the head has none.

    Raises:
        ValueError: the checkpoint's weights are not those of an XLM-R encoder.
    """
    from xlmr_ext import XLMRobertaConfig, XLMRobertaTokenizer
    from xlmr_ext.tasks.registry import head_class

    where = hub(arguments)
    config = XLMRobertaConfig.from_pretrained(arguments.model, **where)
    chosen: dict[str, Any] = {}
    if not labels:
        # The head, where there is one of that name, may be another task's.
        outputs = TASKS[task].num_labels or config.num_labels
        chosen = {"ignore_mismatched_sizes": True}
        chosen |= {} if outputs == config.num_labels else {"num_labels": outputs}
    elif not set(labels) <= {str(label) for label in config.id2label.values()}:
        # Other labels than the checkpoint's: its head, if it has one, answers another question.
        chosen = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
            "ignore_mismatched_sizes": True,
        }
    model, loading = head_class(task).from_pretrained(
        arguments.model, output_loading_info=True, **chosen, **where
    )
    if model.is_frozen:
        raise ValueError(
            f"{arguments.model} is a frozen model, which cannot be trained: give the checkpoint "
            "that it was made from"
        )
    new = [*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])]
    # The pooler is a part of the head: many checkpoints come without.
    refuse_missing(
        (
            name
            for name in new
            if name.startswith("roberta.") and not name.startswith("roberta.pooler.")
        ),
        f"{arguments.model} is no XLM-R checkpoint",
        " of the sizes that its config says",
    )
    model.to(arguments.device)
    return model, XLMRobertaTokenizer.from_pretrained(arguments.model, **where), bool(new)


def load_to_run(
    arguments: argparse.Namespace, task: str
) -> tuple[PreTrainedModel, XLMRobertaTokenizer]:
    """The model of --model and its tokenizer; ValueError where its head is not trained."""
    from xlmr_ext import XLMRobertaTokenizer
    from xlmr_ext.tasks.registry import head_class

    where = hub(arguments)
    model, loading = head_class(task).from_pretrained(
        arguments.model, output_loading_info=True, **where
    )
    what = (
        "is no trained classifier"
        if task == "classification"
        else f"has no trained head for {task}"
    )
    refuse_missing(
        loading["missing_keys"], f"{arguments.model} {what} (make one: {PROGRAM} finetune)"
    )
    to_run(model, arguments)
    return model, XLMRobertaTokenizer.from_pretrained(arguments.model, **where)


def shown_metric(name: str, value: float) -> str:
    """A metric's value for a person: a loss in nats, a share in percent."""
    return f"{value:.4f}" if name == "loss" else f"{value:.2%}"


def shown_metrics(metrics: dict[str, float], prefix: str = "") -> str:
    """Metrics for a person, in a line."""
    return "  ".join(
        f"{prefix}{metric_title(name)} {shown_metric(name, value)}"
        for name, value in metrics.items()
    )


def _given(arguments: argparse.Namespace, task: str, *, of_reader: bool) -> dict[str, Any]:
    values = {
        name: getattr(arguments, _FLAGS.get(name, name))
        for name, option in _OPTIONS.get(task, {}).items()
        if option.of_reader == of_reader
    }
    return {name: value for name, value in values.items() if value is not None}


def _flag(name: str) -> str:
    return "--" + _FLAGS.get(name, name).replace("_", "-")
