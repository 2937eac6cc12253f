"""Options of a command from a TOML file; what the command line says comes before it."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

OPTION = "--config"


def add_config(group: Any) -> None:
    """--config of a command whose arguments :func:`with_config` gets first."""
    group.add_argument(
        OPTION,
        metavar="FILE",
        help="TOML file of options, named as here without the dashes before them: learning-rate = "
        "2e-5, or learning_rate; what the command line says comes first",
    )


def with_config(command: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """A command's arguments with those of its --config before them, so that they give way.

    Bad usage (exit code 2) where the file cannot be read, is no TOML, or has a key that is no
    option or a value that the option does not take.

    Args:
        command: the command's parser, which has --config.
        argv: what follows the command's name.
    """
    finder = argparse.ArgumentParser(
        prog=command.prog, usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False
    )
    # Every abbreviation that the command's parser takes.
    shortest = len("--co")
    finder.add_argument(*(OPTION[:size] for size in range(shortest, len(OPTION) + 1)), dest="path")
    path = finder.parse_known_args(argv)[0].path
    if path is None:
        return list(argv)
    try:
        settings = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        command.error(f"{path}: {error.strerror}")
    except ValueError as error:
        command.error(f"{path}: not TOML: {error}")
    return [*_arguments(command, settings, path), *argv]


def _arguments(
    command: argparse.ArgumentParser, settings: Mapping[str, Any], path: str
) -> list[str]:
    options = {
        name.removeprefix("--"): action
        for action in command._actions
        for name in action.option_strings
        if name.startswith("--") and name not in ("--help", OPTION)
    }
    given: list[str] = []
    seen: dict[str, str] = {}
    for key, value in settings.items():
        name = key.replace("_", "-")
        if name not in options:
            near = difflib.get_close_matches(name, options, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            command.error(f"{path}: there is no option {key!r}{hint}")
        if name in seen:
            command.error(f"{path}: {seen[name]!r} and {key!r} are the same option")
        seen[name] = key
        action = options[name]
        if action.nargs == 0 or (action.nargs == "?" and isinstance(value, bool)):
            if not isinstance(value, bool):
                command.error(f"{path}: {key} must be true or false, got {value!r}")
            given += [f"--{name}"] if value else []
            continue
        if action.nargs == "+" and isinstance(value, list) and all(map(_text, value)):
            given += [f"--{name}", *map(str, value)]
            continue
        text = _text(value)
        if text is None:
            command.error(f"{path}: {key} must be a number or a text, got {value!r}")
        _check(command, action, text, f"{path}: {key}")
        given.append(f"--{name}={text}")
    return given


def _text(value: Any) -> str | None:
    """A value as the command line has it; a list is parted by commas. None where it is none."""
    if isinstance(value, list):
        parts = [_text(part) for part in value if not isinstance(part, list)]
        if len(parts) < len(value) or None in parts:
            return None
        return ",".join(part for part in parts if part is not None)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return value if isinstance(value, str) else repr(value)


def _check(
    command: argparse.ArgumentParser, action: argparse.Action, text: str, where: str
) -> None:
    """Bad usage, with the file and the key, where the option does not take the value."""
    if action.choices is not None and text not in action.choices:
        command.error(f"{where}: expected one of {', '.join(action.choices)}, got {text!r}")
    if callable(action.type):
        try:
            action.type(text)
        except argparse.ArgumentTypeError as error:
            command.error(f"{where}: {error}")
