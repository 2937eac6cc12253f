"""What callers may hand to the tokenizer: texts in their shapes, options, lengths. All checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "choice",
    "positive",
    "read_texts",
    "refuse_later",
    "require_str",
    "strategy",
    "truncated_lengths",
    "utf8",
]

# transformers' options that are not here yet, with the value that asks for nothing.
_LATER = {
    "stride": 0,
    "is_split_into_words": False,
    "return_overflowing_tokens": False,
    "return_offsets_mapping": False,
    "return_special_tokens_mask": False,
}


def utf8(text: str) -> bytes:
    """UTF-8 of a str. A surrogate pair becomes its character, a lone surrogate U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def require_str(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
    return value


def positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
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


def refuse_later(options: Mapping[str, Any]) -> None:
    """Raise for options that are unknown (TypeError) or not supported yet (ValueError)."""
    for name, value in options.items():
        if name not in _LATER:
            raise TypeError(f"XLMRobertaTokenizer: unexpected keyword argument {name!r}")
        if value not in (None, _LATER[name]):
            raise ValueError(f"{name}={value!r}: this option is not supported yet")


def read_texts(text: Any, text_pair: Any) -> tuple[list[str], list[str] | None, bool]:
    """First texts, second texts (None where there are no pairs), and whether it is a batch.

    Raises TypeError that names the first argument which is not text.
    """
    if isinstance(text, str):
        return [text], None if text_pair is None else [require_str("text_pair", text_pair)], False
    if not isinstance(text, (list, tuple)):
        raise TypeError(
            "text: expected a str, a list of str or a list of (str, str) pairs, "
            f"got {type(text).__name__}"
        )
    if text_pair is None and isinstance(text, tuple) and _are(text, list) and len(text) == 2:
        text, text_pair = text
    elif text_pair is None and text and _are(text, tuple):
        for index, pair in enumerate(text):
            if len(pair) != 2:
                raise TypeError(f"text[{index}]: expected a pair, got a tuple of {len(pair)}")
        text, text_pair = [a for a, _ in text], [b for _, b in text]
    firsts = _strings("text", text)
    if text_pair is None:
        return firsts, None, True
    if not isinstance(text_pair, (list, tuple)):
        raise TypeError(
            f"text_pair: expected a list as text is one, got {type(text_pair).__name__}"
        )
    if len(text_pair) != len(firsts):
        raise ValueError(f"text_pair: {len(text_pair)} texts, but text has {len(firsts)}")
    return firsts, _strings("text_pair", text_pair), True


def _are(items: Sequence[Any], kind: type) -> bool:
    return all(isinstance(item, kind) for item in items)


def _strings(name: str, texts: Sequence[Any]) -> list[str]:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            hint = "; a pair is a tuple" if isinstance(text, list) else ""
            raise TypeError(f"{name}[{index}]: expected a str, got {type(text).__name__}{hint}")
    return list(texts)


def truncated_lengths(first: int, second: int | None, limit: int, how: str) -> tuple[int, int]:
    """How many ids to keep of each text so that both together are at most ``limit``.

    "longest_first" takes from the longer until both are as long and then halves the limit between
    them; an odd id goes to the text that was longer, and to the second where neither was. Raises
    ValueError where "only_first" or "only_second" cannot make room.
    """
    other = second or 0
    excess = first + other - limit
    if excess <= 0:
        return first, other
    if second is None:
        return limit, 0
    if how == "longest_first":
        short, long = min(first, other), max(first, other)
        long = max(short, limit - short)
        if short + long > limit:
            short, long = limit // 2, limit - limit // 2
        return (long, short) if first > other else (short, long)
    room = first if how == "only_first" else other
    if room < excess:
        raise ValueError(
            f'truncation="{how}": that text has {room} tokens, and {excess} must go to leave '
            f"{limit} in all; raise max_length or use truncation=True"
        )
    return (first - excess, other) if how == "only_first" else (first, other - excess)
