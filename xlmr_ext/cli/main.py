"""The parser of the whole command line, the choice of a command, and errors as one sentence."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
import warnings
from typing import Any, Protocol, cast

from xlmr_ext import __version__
from xlmr_ext.chance import ChanceWarning
from xlmr_ext.cli import (
    convert,
    demo,
    embed,
    fill_mask,
    finetune,
    info,
    predict,
    pretrain,
    quantize,
    similarity,
    tokenize,
    zero_shot,
)
from xlmr_ext.cli import eval as evaluate
from xlmr_ext.cli.arguments import PROGRAM, Help, add_common, with_options
from xlmr_ext.cli.config_file import OPTION, with_config
from xlmr_ext.cli.console import say
from xlmr_ext.cli.outputs import PatientOutput, ReaderGone, drop_output


class Command(Protocol):
    """What a command's module has."""

    NAME: str
    SUMMARY: str
    DESCRIPTION: str
    EXAMPLES: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int: ...


# In the order of --help.
_MODULES = (
    finetune,
    pretrain,
    predict,
    evaluate,
    embed,
    similarity,
    zero_shot,
    fill_mask,
    quantize,
    convert,
    tokenize,
    demo,
    info,
)
COMMANDS = {module.NAME: cast(Command, module) for module in _MODULES}

_DESCRIPTION = """\
XLM-R on compiled kernels: fine-tune on text in one language, label text in a hundred."""

_EXAMPLES = """\
examples:
  xlmr-ext demo
  xlmr-ext finetune --model FacebookAI/xlm-roberta-base --train train.csv --dev dev.csv \\
      --output topics
  xlmr-ext predict --model topics --input new.txt > labelled.tsv
  xlmr-ext info

exit codes: 0 done, 1 the work failed (one sentence on stderr says why), 2 bad usage.
`xlmr-ext COMMAND --help` has the options and examples of each command."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; its defaults are the documented ones."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=Help
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    add_common(parser, threads=None, seed=42, debug=False)
    # The same options after the command's name; there they say nothing unless they are given.
    quiet = argparse.SUPPRESS
    common = argparse.ArgumentParser(add_help=False)
    add_common(common, threads=quiet, seed=quiet, debug=quiet)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            epilog=command.EXAMPLES,
            formatter_class=Help,
            parents=[common],
        )
        subparser.set_defaults(parser=subparser)
        command.add_arguments(subparser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, 1 (the work failed) or 2 (bad usage)."""
    parser = build_parser()
    try:
        arguments = parser.parse_args(_with_config(parser, sys.argv[1:] if argv is None else argv))
        if arguments.command is None:
            parser.print_help(sys.stderr)
            return 2
        return _run(arguments)
    except SystemExit as stop:  # argparse: 0 for --help and --version, 2 for bad usage
        return stop.code if isinstance(stop.code, int) else 1


def _with_config(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """The arguments with those of a file, where the command takes one."""
    name = next((place for place, word in enumerate(argv) if word in COMMANDS), None)
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    if name is None or OPTION not in commands.choices[argv[name]]._option_string_actions:
        return argv
    return [*argv[: name + 1], *with_config(commands.choices[argv[name]], argv[name + 1 :])]


def _run(arguments: argparse.Namespace) -> int:
    """Runs a command; every failure becomes one sentence on stderr and exit code 1."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", ChanceWarning)
        # What loading says of missing and unused weights is decided here, by refuse_missing.
        logger = logging.getLogger("xlmr_ext")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with contextlib.redirect_stdout(cast(Any, PatientOutput(sys.stdout))):
                result = COMMANDS[arguments.command].run(arguments)
                sys.stdout.flush()
        except KeyboardInterrupt as stop:
            if arguments.debug:
                traceback.print_exc()
            say(f"{stop}" or "stopped")
            return 1
        except ReaderGone:
            drop_output()
            return 0
        except Exception as error:
            if arguments.debug:
                traceback.print_exc()
            say(f"error: {_sentence(error, arguments)}")
            return 1
        finally:
            logger.setLevel(level)
        return result


def _sentence(error: Exception, arguments: argparse.Namespace) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    text = with_options(" ".join(str(error).split()), arguments)
    expected = (ValueError, TypeError, ArithmeticError, OSError, RuntimeError, ImportError)
    if text and isinstance(error, expected):
        return text
    return f"{type(error).__name__}{': ' if text else ''}{text} (--debug shows where)"


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {' '.join(str(message).split())}")
