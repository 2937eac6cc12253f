"""JSON files that come from outside: their size, nesting and kind are bounded before use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["MAX_BYTES", "check_nesting", "read_json"]

MAX_BYTES = 2**26
# What walks through a value, or shows it in a message, may then call itself once a level.
_MAX_LEVELS = 100

Pairs = Callable[[list[tuple[str, Any]]], dict[str, Any]]


def read_json(
    path: Path,
    kind: type = object,
    *,
    what: str = "a JSON file",
    max_bytes: int = MAX_BYTES,
    pairs: Pairs | None = None,
) -> Any:
    """The content of a JSON file.

    Args:
        kind: the type that it must have: dict, list, or object for any.
        what: what the file should be, for messages.
        max_bytes: a larger file is not read.
        pairs: makes an object of its (name, value) pairs, or raises ValueError.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is too large, not JSON, nested too deeply or of another kind; the message
            names it.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path}: {size} bytes is too large for {what}; at most {max_bytes}")
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=pairs)
        check_nesting(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not {what} ({error})") from None
    if not isinstance(value, kind):
        expected = "object" if kind is dict else kind.__name__
        raise ValueError(f"{path}: expected a JSON {expected}, found {type(value).__name__}")
    return value


def check_nesting(value: Any) -> None:
    """Raises ValueError where lists and objects lie more than 100 deep in one another."""
    level = [value]
    for _ in range(_MAX_LEVELS):
        level = [
            child
            for one in level
            if isinstance(one, (dict, list))
            for child in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise ValueError(f"nested more than {_MAX_LEVELS} levels deep")
