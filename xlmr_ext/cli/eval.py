"""``xlmr-ext eval``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlmr_ext.cli.arguments import add_device, add_dtype, add_hub, count
from xlmr_ext.cli.console import check_device, use_threads
from xlmr_ext.cli.inputs import check_paths
from xlmr_ext.cli.outputs import one_line
from xlmr_ext.cli.reporting import as_group, logged_curve, make_folder, report
from xlmr_ext.cli.task_arguments import (
    add_task,
    check_format,
    check_options,
    load_to_run,
    read_task_data,
    refuse_stdin,
    shown_metric,
    task_of_checkpoint,
    task_options,
)
from xlmr_ext.report import Group, mean_metrics, metric_title
from xlmr_ext.tasks.registry import TASKS

if TYPE_CHECKING:
    from xlmr_ext.tasks.base import Task

NAME = "eval"
SUMMARY = "measure a fine-tuned model on labelled files"
DESCRIPTION = """\
Measure a fine-tuned model on labelled files, a group of results for each file.

The files are those of `xlmr-ext finetune`: the task is told by the head of MODEL (or by --task).
A group has the name that is given before its file, or the part of the path that tells the files
apart: of sib200/deu/test.tsv and sib200/fra/test.tsv, deu and fra.

Metrics: loss in nats; accuracy and macro F1 (classification); accuracy of words, precision,
recall and F1 of entities as seqeval counts them (tokens); exact match and F1 of words as SQuAD's
script has them (qa); accuracy (choice). The mean is the plain one over the groups."""

EXAMPLES = """\
examples:
  xlmr-ext eval --model topics --input test.csv
  xlmr-ext eval --model topics --label-column category --report report \\
      --input sib200/deu/test.tsv sib200/fra/test.tsv
  xlmr-ext eval --model entities --input English=en.iob2 German=de.iob2
  xlmr-ext eval --model answers --input xquad.en.json xquad.de.json --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--model", metavar="DIR", required=True, help="directory or hub name")
    data.add_argument(
        "--input",
        metavar="[NAME=]FILE",
        nargs="+",
        required=True,
        help="labelled files, a group each",
    )
    data.add_argument(
        "--report",
        metavar="DIR",
        type=Path,
        help="write a report here: index.html, charts, metrics.json",
    )
    data.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    add_task(parser, data, "what the model's head is for")
    size = parser.add_argument_group("size")
    add_device(size)
    add_dtype(size)
    size.add_argument("--batch-size", metavar="N", type=count, default=32, help="rows a batch")
    size.add_argument(
        "--max-length",
        metavar="N",
        type=count,
        help="tokens that a text is cut to, or that a window has (default: what the model takes; "
        f"qa {TASKS['qa'].max_length})",
    )
    add_hub(parser)
    parser.set_defaults(output=None)


def run(arguments: argparse.Namespace) -> int:
    check_device(arguments)
    inputs = _inputs(arguments)
    task_name = task_of_checkpoint(arguments)
    check_options(arguments, task_name)
    for path in inputs.values():
        check_format(arguments, task_name, path)
    use_threads(arguments)
    if arguments.report is not None:
        make_folder(arguments.report)
    task = _task(arguments, task_name)
    groups = [_measured(arguments, task, name, path) for name, path in inputs.items()]
    if arguments.json:
        print(json.dumps(_as_json(arguments, task, groups), ensure_ascii=False))
    else:
        print(_table(groups, TASKS[task_name].unit))
    sys.stdout.flush()
    if arguments.report is not None:
        report(
            arguments.report,
            title=f"Evaluation of {Path(arguments.model).name or arguments.model}",
            task=task_name,
            groups=groups,
            labels=task.labels,
            training=logged_curve(Path(arguments.model)),
            facts={"model": str(arguments.model), "task": task_name},
        )
    return 0


def _inputs(arguments: argparse.Namespace) -> dict[str, Path]:
    """The files by their groups' names; bad usage where two have the same."""
    given = [_named(text) for text in arguments.input]
    refuse_stdin(arguments, (path for _, path in given))
    check_paths(arguments, [str(path) for _, path in given])
    unnamed = iter(group_names([path for name, path in given if not name]))
    names = [name or next(unnamed) for name, _ in given]
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        arguments.parser.error(
            f"{times} inputs are called {name!r}: name them apart, --input NAME=FILE ..."
        )
    return dict(zip(names, (path for _, path in given), strict=True))


def _named(text: str) -> tuple[str, Path]:
    """Name ("" for none) and path of ``NAME=FILE`` or ``FILE``."""
    name, equals, path = text.partition("=")
    if not equals or not name or Path(text).exists():
        return "", Path(text)
    return name, Path(path)


def group_names(paths: Sequence[Path]) -> list[str]:
    """What tells files apart: the last part of their paths that differs in all of them.

    The suffix does not count, and neither do words at both ends that all names share (parted by
    one of ``._-``): xquad.en.json and xquad.de.json are en and de. Where no part alone tells them
    apart, a name has all parts that differ; a single file has its own name.
    """
    parts = [[*path.parts[:-1], path.stem][::-1] for path in paths]
    if len(paths) < 2:
        return [names[0] for names in parts]
    depth = min(map(len, parts))
    levels = [_trimmed([names[level] for names in parts]) for level in range(depth)]
    for names in levels:
        if len(set(names)) == len(names):
            return names
    differing = [names for names in levels if len(set(names)) > 1]
    return ["/".join(reversed(names)) for names in zip(*differing, strict=True)] or [
        names[0] for names in parts
    ]


def _trimmed(names: Sequence[str]) -> list[str]:
    """Names without the words at their ends that they share; those that would be empty stay."""
    split = [re.split(r"([._-])", name) for name in names]
    shortest = min(map(len, split))
    first = 0
    while first + 1 < shortest and len({tuple(words[: first + 2]) for words in split}) == 1:
        first += 2
    last = 0
    while first + last + 2 < shortest and (
        len({tuple(words[len(words) - last - 2 :]) for words in split}) == 1
    ):
        last += 2
    return ["".join(words[first : len(words) - last]) for words in split]


def _task(arguments: argparse.Namespace, name: str) -> Task:
    from xlmr_ext.prediction import longest_input
    from xlmr_ext.tasks.registry import make_task

    model, tokenizer = load_to_run(arguments, name)
    length = arguments.max_length
    if length is None and name != "qa":
        # As `predict` has it: nothing is cut off that the model could read.
        length = longest_input(model)
    return make_task(name, model, tokenizer, max_length=length, **task_options(arguments, name))


def _measured(arguments: argparse.Namespace, task: Task, name: str, path: Path) -> Group:
    from xlmr_ext.data import check_vocabulary

    data = task.load(read_task_data(arguments, task.name, path), str(path))
    task.adopt(data)
    features = task.features(data, training=False)
    check_vocabulary(features.sequences, int(task.model.config.vocab_size))
    scores = task.evaluate(task.model, features, batch_size=arguments.batch_size)
    return as_group(name, len(data), scores)


def _as_json(arguments: argparse.Namespace, task: Task, groups: Sequence[Group]) -> dict[str, Any]:
    return {
        "model": str(arguments.model),
        "task": task.name,
        "labels": task.labels,
        "groups": [group.as_row() for group in groups],
        "mean": mean_metrics(groups),
    }


def _table(groups: Sequence[Group], unit: str) -> str:
    """A row a group, and their mean; columns as wide as need be."""
    means = mean_metrics(groups)
    rows = [["", unit, *map(metric_title, means)]]
    for group in groups:
        shown = (shown_metric(name, group.metrics[name]) for name in means)
        rows.append([one_line(group.name), str(group.rows), *shown])
    if len(groups) > 1:
        rows.append(["mean", "", *(shown_metric(name, value) for name, value in means.items())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    )
