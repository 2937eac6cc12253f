"""Tokens that are found as they are written in a text: the special ones, and those users add."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["AddedToken", "Found", "Matcher", "stripped"]

# Unicode's White_Space: str.isspace() takes four control characters for white space too.
_WHITE_SPACE = frozenset(
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)


@dataclass(frozen=True)
class AddedToken:
    """A token with the attributes of the ``tokenizers`` library's ``AddedToken``.

    Args:
        content: the text of the token.
        single_word: found only where no letter, digit or underscore touches it.
        lstrip, rstrip: takes the white space on its left or right with it.
        normalized: looked for in the normalized text, so that ``fi`` is found in "ﬁ" too;
            by default what is not special is.
        special: ``skip_special_tokens=True`` drops it when decoding.
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.content, str):
            raise TypeError(f"AddedToken: content must be a str, got {type(self.content).__name__}")
        if any("\ud800" <= character <= "\udfff" for character in self.content):
            raise ValueError(f"AddedToken: content {self.content!r} has half a character")
        if self.normalized is None:
            object.__setattr__(self, "normalized", not self.special)

    def __str__(self) -> str:
        return self.content

    @classmethod
    def of(cls, value: Any, *, special: bool | None = None) -> AddedToken:
        """From a str, a mapping as in the files, or an object with the same attributes.

        ``special`` replaces the value's own; a str is special as it says.
        """
        if isinstance(value, str):
            return cls(value, special=bool(special))
        names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        if isinstance(value, Mapping):
            given = {name: value[name] for name in names if name in value}
        else:
            given = {name: getattr(value, name) for name in names if hasattr(value, name)}
        if "content" not in given:
            raise TypeError(
                f"expected a token as a str, an AddedToken or a mapping, got {type(value).__name__}"
            )
        if special is not None:
            given["special"] = special
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """As ``added_tokens_decoder`` of tokenizer_config.json holds it."""
        return {
            "content": self.content,
            "lstrip": self.lstrip,
            "normalized": self.normalized,
            "rstrip": self.rstrip,
            "single_word": self.single_word,
            "special": self.special,
        }


class Found(NamedTuple):
    """A token found at ``text[start:end]``, white space that it takes along included."""

    start: int
    end: int
    token: AddedToken


class Matcher:
    """Finds tokens in texts: from the left, the longest of those that begin at one place.

    Args:
        tokens: what to look for.
        written: how a token is written in the texts that are searched, by default as it is; a
            token for which it gives "" is never found.
        strips: whether tokens take white space with them, as they say.
    """

    def __init__(
        self,
        tokens: Iterable[AddedToken],
        written: Callable[[AddedToken], str] = str,
        strips: bool = True,
    ) -> None:
        self._tokens: dict[str, AddedToken] = {}
        for token in tokens:
            text = written(token)
            if text:
                self._tokens.setdefault(text, token)
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))
        self._strips = strips

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def may_find(self, text: str) -> bool:
        """Whether any token is written in ``text``; quick."""
        return any(token in text for token in self._tokens)

    def find(self, text: str) -> Iterator[Found]:
        """The tokens in a text, in order; they do not overlap."""
        if not self._tokens:
            return
        done = 0
        for match in self._pattern.finditer(text):
            start, end = match.span()
            token = self._tokens[match.group()]
            if start < done:  # the token before took this one's white space
                continue
            touched = _is_word(text[start - 1 : start]) or _is_word(text[end : end + 1])
            if token.single_word and touched:
                continue
            found = Found(start, end, token)
            if self._strips:
                found = stripped(text, found, done)
            yield found
            done = found.end


def stripped(text: str, found: Found, done: int) -> Found:
    """With the white space that the token takes, on the left no further than ``done``."""
    start, end, token = found
    while token.lstrip and start > done and text[start - 1] in _WHITE_SPACE:
        start -= 1
    while token.rstrip and end < len(text) and text[end] in _WHITE_SPACE:
        end += 1
    return Found(start, end, token)


def _is_word(character: str) -> bool:
    return re.match(r"\w", character) is not None
