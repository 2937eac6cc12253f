"""The tokenizer against transformers', text by text: equal, or different for a known reason.

Known reasons, each checked, not assumed:

* "normal form": the tokenizers library normalizes grapheme by grapheme and loses or does not
  compose some marks, takes U+0085 for white space, and keeps runs of U+2581. Then the normalized
  texts themselves differ.
* "tie": two segmentations whose scores are equal to within the rounding of sentencepiece's float32
  sums; the tokenizers library adds in float64.
* "composed": one character made from several code points; ours spans all of them, theirs the first.
* "dropped": normalization dropped a control character, and the spans of the tokenizers library
  slip. Ours are checked by themselves.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from xlmr_ext.tokenization import XLMRobertaTokenizer

SPACE = "\u2581"
_SPECIAL = re.compile("(<s>|<pad>|</s>|<unk>|<mask>)")


def differences(
    ours: XLMRobertaTokenizer, theirs: Any, texts: Sequence[str]
) -> list[tuple[str, str]]:
    """(reason, text) of every text that comes out differently.

    Raises AssertionError for a difference that has no known reason, and for spans of ours that are
    wrong by themselves (of many texts some are checked, as it takes long).
    """
    checked = range(0, len(texts), 1 + len(texts) // 1000)
    got = ours(list(texts), return_offsets_mapping=True)
    expected = theirs(list(texts), return_offsets_mapping=True)
    found = []
    for row, text in enumerate(texts):
        ids, spans = got["input_ids"][row], got["offset_mapping"][row]
        their_ids, their_spans = expected["input_ids"][row], expected["offset_mapping"][row]
        if row in checked:
            check_spans(ours, text, got.tokens(row), spans)
        if ids != their_ids:
            found.append((_of_ids(ours, theirs, text, ids, their_ids), text))
            continue
        assert got.word_ids(row) == expected.word_ids(row), ascii(text)
        for span, other in zip(spans, their_spans, strict=True):
            if span != other:
                found.append((_of_spans(ours, theirs, text, span, other), text))
                break
    return found


def _of_ids(
    ours: XLMRobertaTokenizer, theirs: Any, text: str, ids: list[int], others: list[int]
) -> str:
    if _normal_forms_differ(ours, theirs, text):
        return "normal form"
    first, second = (sum(_score(ours, index) for index in row) for row in (ids, others))
    # Both sums were rounded after every piece: half a unit of the last place of float32 each time.
    rounding = max(len(ids), len(others)) * 2**-24 * max(abs(first), abs(second))
    assert abs(first - second) <= 2 * rounding, f"{text!a}: {ids} has {first}, {others} {second}"
    return "tie"


def _normal_forms_differ(ours: XLMRobertaTokenizer, theirs: Any, text: str) -> bool:
    normalize = ours._pieces.model.normalize
    their_normalize = theirs.backend_tokenizer.normalizer.normalize_str
    for part in _SPECIAL.split(text)[::2]:
        words = their_normalize(part).split()
        if normalize(part) != "".join(SPACE + word for word in words):
            return True
    return False


def _score(ours: XLMRobertaTokenizer, index: int) -> float:
    model = ours._pieces.model
    if index == 3:
        return _unknown_score(model)
    return float(model.get_score(index - 1)) if 4 <= index < ours.vocab_size - 1 else 0.0


@lru_cache
def _unknown_score(model: Any) -> float:
    """As sentencepiece sets it: 10 below the least score."""
    return min(float(model.get_score(index)) for index in range(3, len(model))) - 10


def _of_spans(
    ours: XLMRobertaTokenizer,
    theirs: Any,
    text: str,
    span: tuple[int, int],
    other: tuple[int, int],
) -> str:
    if _normal_forms_differ(ours, theirs, text):
        return "normal form"
    if any(character in ours._pieces.deletable for character in text):
        return "dropped"
    assert span[0] == other[0] < other[1] < span[1], f"{text!a}: {span} {other}"
    rest = text[other[1] : span[1]]
    marks = all(unicodedata.category(c)[0] == "M" or "\u1160" <= c <= "\u11ff" for c in rest)
    assert marks, f"{text!a}: {span} {other}, and {rest!a} composes with nothing"
    return "composed"


def check_spans(
    ours: XLMRobertaTokenizer, text: str, tokens: list[str], spans: list[tuple[int, int]]
) -> None:
    """Spans ascend, hold their tokens, and leave nothing out but what normalization does."""
    normalize = ours._pieces.model.normalize
    covered = [False] * len(text)
    last = (0, 0)
    for token, span in zip(tokens[1:-1], spans[1:-1], strict=True):
        where = f"{text!a}: {token!a} {span} after {last}"
        assert last[0] <= span[0] < span[1] <= len(text), where
        assert last[1] <= span[1], where
        piece = _utf16(text[slice(*span)])
        plain = token.removeprefix(SPACE)
        assert plain in normalize(piece) or plain in piece, f"{text!a}: {token!a} not in {piece!a}"
        covered[span[0] : span[1]] = [True] * (span[1] - span[0])
        last = span
    for place, character in enumerate(text):
        if not covered[place]:
            alone = normalize(f"a{_utf16(character)}a")
            assert alone in (f"{SPACE}aa", f"{SPACE}a{SPACE}a"), f"{text!a}: nothing at {place}"


def _utf16(text: str) -> str:
    """Pairs of surrogates as characters, lone ones as U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
