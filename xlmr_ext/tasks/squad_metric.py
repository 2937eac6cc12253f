"""SQuAD's measures of an answer: exact match and F1 of the words, after its normalization.

As in SQuAD 2.0's evaluation script, which differs from 1.1's for answers only of which nothing is
left by normalization. English articles and ASCII punctuation are dropped whatever the language, as
XQuAD's authors do (Artetxe et al. 2020, arXiv 1910.11856). MLQA's measure, which drops the articles
of each language and splits Chinese into characters, is another one, and not used here.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

__all__ = ["exact_match", "normalize", "word_f1"]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Lower case without ASCII punctuation, without a, an and the, words parted by one space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 where an answer is one of the right ones, else 0.

    Args:
        answer: "" where the answer is that there is none.
        right: the right answers; none where there is no answer.
    """
    return float(normalize(answer) in _normalized(right))


def word_f1(answer: str, right: Sequence[str]) -> float:
    """The best F1 of an answer's words with a right one's, 0 to 1; arguments as of exact_match.

    With c words in common (a word twice in both counts twice), precision is c / words of the
    answer, recall c / words of the right one, and F1 their harmonic mean. Where one of the two has
    no words, it is 1 if the other has none either.
    """
    return max(_f1(normalize(answer).split(), other.split()) for other in _normalized(right))


def _f1(words: list[str], others: list[str]) -> float:
    if not words or not others:
        return float(words == others)
    common = (Counter(words) & Counter(others)).total()
    return 2 * common / (len(words) + len(others))


def _normalized(right: Sequence[str]) -> list[str]:
    """Of the right answers those of which something is left, or [""]: no answer."""
    return [text for text in map(normalize, right) if text] or [""]
