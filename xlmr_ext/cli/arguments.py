"""What the commands' arguments share: help in one format, checked numbers, groups of options."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

PROGRAM = "xlmr-ext"
TEXT_FORMATS = ("csv", "tsv", "jsonl", "txt")


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Line breaks as written, and the defaults of the options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        written = "(default: " in (action.help or "")
        if written or action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


def add_common(parser: argparse.ArgumentParser, *, threads: Any, seed: Any, debug: Any) -> None:
    group = parser.add_argument_group("options of every command")
    group.add_argument(
        "--threads",
        metavar="N",
        type=count,
        default=threads,
        help="processor threads (default: OMP_NUM_THREADS, else what affinity and the "
        "container's quota allow)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=seed_number,
        default=seed,
        help="of all random numbers (default: 42)",
    )
    group.add_argument(
        "--debug", action="store_true", default=debug, help="show the traceback of an error"
    )


def add_columns(
    group: Any, label_default: str | None, formats: Sequence[str] = TEXT_FORMATS
) -> None:
    add_text_format(group, formats)
    group.add_argument("--pair-column", metavar="NAME", help="holds the second text of a pair")
    group.add_argument(
        "--label-column",
        metavar="NAME",
        default=label_default,
        help="holds the labels" if label_default else "holds labels to compare with",
    )


def add_text_format(group: Any, formats: Sequence[str] = TEXT_FORMATS) -> None:
    """How the texts lie in files: column, format, encoding."""
    group.add_argument("--text-column", metavar="NAME", default="text", help="holds the texts")
    group.add_argument(
        "--input-format", choices=formats, help="of the files (default: by the suffix)"
    )
    group.add_argument(
        "--encoding-errors",
        choices=("strict", "replace"),
        default="strict",
        help="bytes that are not UTF-8 are an error, or read as U+FFFD",
    )


def add_dtype(group: Any) -> None:
    """--dtype of what runs."""
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "int8", "auto"),
        help="of the weights while they run; bfloat16 and int8 are faster and less exact, see "
        "`xlmr-ext quantize`; auto: bfloat16 where the processor has units for it, see `xlmr-ext "
        "info` (default: float32, or a frozen model's own)",
    )


def add_device(group: Any) -> None:
    """--device of what runs."""
    group.add_argument(
        "--device",
        metavar="NAME",
        type=_device,
        default="cpu",
        help="where the model runs: cpu, cuda, or cuda:N for the GPU of number N",
    )


def _device(text: str) -> str:
    if re.fullmatch(r"cpu|cuda(:\d{1,3})?", text) is None:
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    return text


def add_course(parser: argparse.ArgumentParser) -> Any:
    """A group of what every run of training leaves on its way, for a command to add to."""
    course = parser.add_argument_group("course of the run")
    course.add_argument(
        "--log-steps",
        metavar="N",
        type=count,
        default=1,
        help="steps from one line of OUTPUT/xlmr_ext_training.jsonl to the next",
    )
    course.add_argument(
        "--resume",
        action="store_true",
        help="go on from the state in OUTPUT, to the same bits as a run that was never stopped; "
        "give the rest of the command as it was",
    )
    return course


def add_hub(parser: argparse.ArgumentParser) -> None:
    hub = parser.add_argument_group("where the model comes from")
    hub.add_argument("--revision", metavar="REF", help="branch, tag or commit of a hub model")
    hub.add_argument("--cache-dir", metavar="DIR", help="instead of the hub's usual cache")
    hub.add_argument(
        "--local-files-only", action="store_true", help="never download; take what the cache has"
    )


def count(text: str) -> int:
    return int(_number(text, int, lambda value: value >= 1, "a whole number of at least 1"))


def count_or_zero(text: str) -> int:
    return int(_number(text, int, lambda value: value >= 0, "a whole number of 0 or more"))


def seed_number(text: str) -> int:
    return int(_number(text, int, lambda value: 0 <= value < 2**32, "from 0 to 2**32 - 1"))


def above_zero(text: str) -> float:
    return _number(text, float, lambda value: value > 0, "a number above 0")


def not_negative(text: str) -> float:
    return _number(text, float, lambda value: value >= 0, "a number of 0 or more")


def share(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


# Options that have another name in the library, by their own: what a message says, and what for it.
_RENAMED = {
    "tag_errors": ("errors='repair'", "--tag-errors repair"),
    "template": ("hypothesis_template", "--template"),
    "labels": ("candidate_labels", "--labels"),
}


def with_options(message: str, arguments: argparse.Namespace) -> str:
    """A message of the library with the command's options instead of the arguments' names.

    Only names of more than one word are looked for, as no sentence has them by chance; not within
    a path or a quotation, which may be the user's own.
    """
    options = {name: f"--{name.replace('_', '-')}" for name in vars(arguments) if "_" in name}
    options |= dict(_RENAMED[name] for name in vars(arguments) if name in _RENAMED)
    for name, option in options.items():
        pattern = rf"(?<![\w./'\"-]){re.escape(name)}(?![\w/'\"=-]|\.\w)"
        message = re.sub(pattern, option, message)
    return message


def _number(
    text: str, kind: Callable[[str], float], holds: Callable[[float], bool], expected: str
) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not holds(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value
