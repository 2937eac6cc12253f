"""What callers may hand to the tokenizer: texts in their shapes, options, lengths. All checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = [
    "choice",
    "not_negative",
    "positive",
    "read_texts",
    "require_str",
    "strategy",
]


def require_str(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
    return value


def positive(name: str, value: Any) -> int:
    return _integer(name, value, 1)


def not_negative(name: str, value: Any) -> int:
    return _integer(name, value, 0)


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return int(value)


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    # Compared one by one, as transformers' enumerations are str and equal to their names.
    for known in allowed:
        if value == known:
            return known
    raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def strategy(name: str, value: Any, allowed: Sequence[str]) -> str:
    """False means the first of ``allowed``, True the second."""
    if value is None or isinstance(value, bool):
        return allowed[bool(value)]
    return choice(name, value, allowed)


def read_texts(
    text: Any, text_pair: Any, *, words: bool = False
) -> tuple[list[Any], list[Any] | None, bool]:
    """First texts, second texts (None where there are no pairs), and whether it is a batch.

    A text is a str, or with ``words`` a list of them. Raises TypeError that names the first
    argument which is not text.
    """
    if isinstance(text, str):
        if words:
            raise TypeError("text: is_split_into_words needs a list of words, got str")
        return [text], None if text_pair is None else [require_str("text_pair", text_pair)], False
    if not isinstance(text, (list, tuple)):
        raise TypeError(
            "text: expected a str, a list of str or a list of (str, str) pairs, "
            f"got {type(text).__name__}"
        )
    if words and not (text and isinstance(text[0], (list, tuple))):
        second = None if text_pair is None else [_words("text_pair", text_pair)]
        return [_words("text", text)], second, False
    lists_of_texts = isinstance(text, tuple) and len(text) == 2 and _are(text, list)
    if text_pair is None and lists_of_texts and not words:
        text, text_pair = text
    elif text_pair is None and text and _are(text, tuple) and not (words and _are(text[0], str)):
        for index, pair in enumerate(text):
            if len(pair) != 2:
                raise TypeError(f"text[{index}]: expected a pair, got a tuple of {len(pair)}")
        text, text_pair = [a for a, _ in text], [b for _, b in text]
    firsts = _all("text", text, words)
    if text_pair is None:
        return firsts, None, True
    if not isinstance(text_pair, (list, tuple)):
        raise TypeError(
            f"text_pair: expected a list as text is one, got {type(text_pair).__name__}"
        )
    if len(text_pair) != len(firsts):
        raise ValueError(f"text_pair: {len(text_pair)} texts, but text has {len(firsts)}")
    return firsts, _all("text_pair", text_pair, words), True


def _are(items: Sequence[Any], kind: type) -> bool:
    return all(isinstance(item, kind) for item in items)


def _all(name: str, texts: Sequence[Any], words: bool) -> list[Any]:
    if words:
        return [_words(f"{name}[{index}]", text) for index, text in enumerate(texts)]
    if not _are(texts, str):
        index, text = next((i, t) for i, t in enumerate(texts) if not isinstance(t, str))
        hint = "; a pair is a tuple" if isinstance(text, list) else ""
        raise TypeError(f"{name}[{index}]: expected a str, got {type(text).__name__}{hint}")
    return list(texts)


def _words(name: str, value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list of words, got {type(value).__name__}")
    return [require_str(f"{name}[{index}]", word) for index, word in enumerate(value)]
